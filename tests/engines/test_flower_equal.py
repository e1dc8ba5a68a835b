"""The Flower engine on a grid in this process equals the local engine, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.stops import StopAfter
from tests.test_run import adapters, lines, summary
from tests.tiny import tiny_job, without_reports

from fedgrove.start import run

__all__ = ["virtual"]
pytestmark = pytest.mark.usefixtures("virtual")

MIXED: dict[str, Any] = {"federation": {"ranks": [2, 4, 3]}, "lora": {"rank": 4}}
JOBS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "fedtreelora": {"method": {"warmup_rounds": 1}},
    "hilora": {"run": {"rounds": 4}},
    "fed-plora": MIXED,
}
SAMPLED = {"federation": {"held_out": ["site-1"]}, "run": {"rounds": 2, "evaluate": 1}}


def same(one: Path, other: Path) -> None:
    assert adapters(one) == adapters(other)
    assert summary(one) == summary(other)
    assert lines(one) == lines(other)
    files = {"federation.json", "job.toml"} | {f.name for f in one.glob("*.json")}
    for name in files - {"summary.json", "versions.json"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("method", JOBS)
def test_a_run_on_flower_equals_a_local_one(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    changes = {key: dict(value) for key, value in JOBS[method].items()}
    changes.setdefault("method", {})["name"] = method
    job = tiny_job(tiny_bert, silos, **changes, train={"final_local_epochs": 1, "cohort": 1})
    run(job, tmp_path / "local")
    run_on(FakeGrid(3), job, tmp_path / "flower")
    same(tmp_path / "local", tmp_path / "flower")


def test_the_same_clients_are_measured_on_flower(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos, **SAMPLED, train={"final_local_epochs": 1, "cohort": 1})
    with without_reports():
        run(job, tmp_path / "local")
        run_on(FakeGrid(3), job, tmp_path / "flower")
    assert summary(tmp_path / "local")["measured"] == {"clients": 1, "of": 2}
    same(tmp_path / "local", tmp_path / "flower")


def test_the_best_round_leaves_from_flower_too(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """Each client goes home with its own store of that round, also after a stop."""
    job = tiny_job(
        tiny_bert,
        silos,
        data={"validation_fraction": 0.25},
        method={"name": "fedsa-lora"},
        run={"rounds": 6, "keep": "best"},
        train={"lr": 0.05, "cohort": 1},
    )
    result = run(job, tmp_path / "local")
    best = result.left_after
    assert best < 6
    with pytest.raises(KeyboardInterrupt):
        run_on(FakeGrid(3), job, tmp_path / "flower", callbacks=[StopAfter(best + 2)])
    run_on(FakeGrid(3), job, tmp_path / "flower", resume=True)
    same(tmp_path / "local", tmp_path / "flower")


def test_a_run_from_an_adapter_is_the_same_on_flower(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    first = tiny_job(tiny_bert, silos, run={"rounds": 1}, train={"cohort": 1})
    run(first, tmp_path / "first")
    start = {"adapter": str(tmp_path / "first" / "adapters" / "site-0")}
    job = tiny_job(tiny_bert, silos, model=start, run={"rounds": 1}, train={"cohort": 1})
    run(job, tmp_path / "local")
    run_on(FakeGrid(3), job, tmp_path / "flower")
    same(tmp_path / "local", tmp_path / "flower")
