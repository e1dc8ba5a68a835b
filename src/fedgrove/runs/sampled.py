"""Which clients are measured (``run.evaluate``): all, or as many as are asked for, drawn anew each
round. Training does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgrove.ground.seeds import numpy_rng
from fedgrove.job.sections import Evaluate

SAMPLE = 100  # clients of ``run.evaluate = "sample"``


def drawn(names: Sequence[str], wanted: Evaluate, seed: int, round: int) -> list[str]:
    """Those of ``names`` that are measured after ``round``, in their order.

    The draw depends on the seed, the round and the names alone: methods of one comparison measure
    the same clients, and so does a run that was resumed.
    """
    if wanted == "all":
        return list(names)
    most = SAMPLE if wanted == "sample" else wanted
    if len(names) <= most:
        return list(names)
    draw = numpy_rng(seed, "evaluate", round)
    chosen = set(draw.choice(sorted(names), most, replace=False).tolist())
    return [name for name in names if name in chosen]
