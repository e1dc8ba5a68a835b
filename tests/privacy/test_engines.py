"""Privacy and compression act the same on either side of a wire: Flower's messages give what the
local engine gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.test_run import adapters, lines, summary
from tests.tiny import tiny_job

from fedgrove.adapters.tree import numbers
from fedgrove.engines.flower.wire import decode
from fedgrove.start import run

__all__ = ["virtual"]
pytestmark = pytest.mark.usefixtures("virtual")

SHARED: dict[str, Any] = {
    "method": {"name": "fedit", "weights": "uniform"},
    "federation": {"head": "shared"},
}
JOBS: dict[str, dict[str, Any]] = {
    "client level": {**SHARED, "privacy": {"clip": 0.2, "client_noise": 1.0, "randomness": "seed"}},
    "example level": {"privacy": {"example_clip": 0.5, "example_noise": 1.0, "randomness": "seed"}},
    "int8": {**SHARED, "run": {"compress": "int8"}},
    "fp16, a tree": {
        "method": {"name": "fedtreelora", "warmup_rounds": 1},
        "run": {"compress": "fp16"},
    },
    "secure": {**SHARED, "privacy": {"clip": 5.0, "secure_aggregation": True}},
    "secure, with weights": {
        "method": {"name": "fedit", "weights": "examples"},
        "privacy": {"clip": 5.0, "secure_aggregation": True},
    },
    "secure, with noise": {
        **SHARED,
        "privacy": {
            "clip": 0.2,
            "client_noise": 1.0,
            "randomness": "seed",
            "secure_aggregation": True,
        },
        "run": {"compress": "int8"},
    },
    "both": {
        **SHARED,
        "run": {"compress": "int8"},
        "privacy": {
            "clip": 0.2,
            "client_noise": 1.0,
            "example_clip": 1.0,
            "example_noise": 0.5,
            "randomness": "seed",
        },
    },
}


@pytest.mark.parametrize("name", JOBS)
def test_a_run_on_flower_equals_a_local_one(
    name: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert,
        silos,
        **{key: dict(value) for key, value in JOBS[name].items()},
        train={"cohort": 1},
    )
    run(job, tmp_path / "local")
    run_on(FakeGrid(3), job, tmp_path / "flower")
    assert adapters(tmp_path / "local") == adapters(tmp_path / "flower")
    assert summary(tmp_path / "local") == summary(tmp_path / "flower")
    assert lines(tmp_path / "local") == lines(tmp_path / "flower")


def test_a_message_is_smaller_by_what_the_accounting_says(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    sizes: dict[str, float] = {}
    for how in ("none", "int8"):
        job = tiny_job(tiny_bert, silos, lora={"rank": 8}, run={"compress": how, "rounds": 1})
        grid = FakeGrid(3)
        run_on(grid, job, tmp_path / how)
        notes = [(blob, decode(blob)) for _, blob in grid.blobs]
        sizes[how] = next(
            len(blob) for blob, note in notes if note.kind == "train" and "update" in note.body
        )
        content = next(
            n.body["update"] for _, n in notes if n.kind == "train" and "update" in n.body
        )
        each = {"none": 4.0, "int8": 1.0 + 2 / 32}[how]
        sizes[f"{how} numbers"] = numbers(content) * each
    saved = sizes["none numbers"] - sizes["int8 numbers"]
    assert 0.7 * saved < sizes["none"] - sizes["int8"] <= saved
