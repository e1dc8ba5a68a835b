"""Memory is that of one site of all clients, not of all clients' models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.aggregate.made import write

CHILD = """
import sys
from pathlib import Path
import scipy.cluster.hierarchy, sklearn.metrics  # loaded when needed, and no part of what is measured
from fedgrove.aggregate import aggregate

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

root, method = Path(sys.argv[1]), sys.argv[2]
clients = sorted((root / "in").iterdir())
aggregate(method, clients[:2], root / "small")
before = peak()
aggregate(method, clients, root / "large")
print(peak() - before)
"""


def growth(root: Path, method: str, clients: int, layers: int) -> tuple[int, int]:
    """(bytes that the peak grew from two clients to all, bytes of all clients' adapters of 32 KiB a
    layer).
    """
    import numpy as np
    import torch

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    draw = np.random.default_rng(0)
    factors = {
        f"model.layers.{layer}.self_attn.{end}": (
            draw.normal(size=(8, 256)),
            draw.normal(size=(256, 8)),
        )
        for layer in range(layers)
        for end in ("q_proj", "v_proj")
    }
    first = write(root / "in" / "c0", factors, 16, dtype=torch.float32)
    size = (first / "adapter_model.safetensors").stat().st_size
    for number in range(1, clients):
        folder = write(root / "in" / f"c{number}", factors, 16, dtype=torch.float32)
        path = folder / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = draw.normal(size=(size - start) // 4).astype("<f4").tobytes()
        path.write_bytes(content)
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), method],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout), clients * size


def test_memory_with_40_clients(tmp_path: Path) -> None:
    grown, held = growth(tmp_path, "fedit", 40, layers=32)
    assert held > 40 << 20
    assert grown < 20 << 20


@pytest.mark.slow
@pytest.mark.parametrize("method", ["flora", "flexlora", "fedtreelora"])
def test_memory_with_200_clients(method: str, tmp_path: Path) -> None:
    grown, held = growth(tmp_path, method, 200, layers=48)
    assert held > 280 << 20
    assert grown < 120 << 20
