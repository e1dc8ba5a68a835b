"""What a job computes, as digests: the default job, two rounds (HiLoRA three), with every method.

    python tests/fingerprints/make.py OUT.json [METHOD …]     # default: every method of the package

Run on two versions of the code and compare the files: equal digests mean equal adapters (each tensor of each client,
and of the global model) and an equal ``summary.json`` but for its seconds. Digests depend on the machine's arithmetic,
so a file says what it was made on, and is compared only on such a machine (``tests/test_fingerprints.py``).
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

import fedgrove as fg
from fedgrove.methods.registry import catalogue

ROUNDS = {"hilora": 3}  # a round for each tier
THREADS = 2


def machine() -> dict[str, str]:
    """What digests of floating-point arithmetic depend on."""
    return {
        "architecture": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": str(torch.cpu._is_avx512_bf16_supported()),
        "amx": str(torch.cpu._is_amx_tile_supported()),
        "torch": torch.__version__,
    }


def fingerprint(method: str, out: Path) -> dict[str, str]:
    """Run the default job with a method into ``out``; the digests of its adapters and of its summary."""
    settings = [
        f"method.name={method}",
        f"run.rounds={ROUNDS.get(method, 2)}",
        f"train.threads={THREADS}",
    ]
    fg.run(fg.Job.default().override(settings), out)
    adapters = hashlib.sha256()
    for file in sorted((out / "adapters").rglob("*.safetensors")):
        adapters.update(file.relative_to(out).as_posix().encode())
        adapters.update(file.read_bytes())
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    summary.pop("seconds")
    words = json.dumps(summary, sort_keys=True)
    return {"adapters": adapters.hexdigest(), "summary": hashlib.sha256(words.encode()).hexdigest()}


def own_methods() -> list[str]:
    """The methods of this package, without those that others have installed."""
    return [name for name, kind in catalogue().items() if kind.__module__.startswith("fedgrove.")]


def main() -> None:
    out, methods = Path(sys.argv[1]), sys.argv[2:] or own_methods()
    found: dict[str, dict[str, str]] = {}
    for method in methods:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found[method] = fingerprint(method, Path(folder) / "run")
        print(f"{method}: {time.perf_counter() - started:.0f} s", flush=True)
        text = json.dumps({"machine": machine(), "methods": found}, indent=1)
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
