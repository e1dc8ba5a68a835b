"""Federated fine-tuning with LoRA: every client leaves with its own PEFT adapter.

    import fedgrove as fg

    result = fg.run(fg.Job.load("job.toml"))
    model = result.client("clinic-3").model()

The names below are imported when first used, so that ``import fedgrove`` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.pools import Pool, open_pool, pool
    from fedgrove.start import run
    from fedgrove.use.personal import load
    from fedgrove.use.result import Result

# Before torch is imported: threads that wait for each other spin for a moment, then sleep. Endless
# spinning, the default, makes training ten times slower as soon as another process wants a core;
# sleeping at once costs a sixth.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
# oneDNN keeps a kernel for each shape that it has met: so many at most.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")

__version__ = "0.1.0"
__all__ = ["Job", "Pool", "Result", "__version__", "load", "open_pool", "pool", "run"]

_HOME = {
    "Job": "fedgrove.job",
    "Pool": "fedgrove.pools",
    "Result": "fedgrove.use.result",
    "load": "fedgrove.use.personal",
    "open_pool": "fedgrove.pools",
    "pool": "fedgrove.pools",
    "run": "fedgrove.start",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedgrove' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
