"""The validation split's lines in metrics.jsonl: there for tuning, and nowhere else to be seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import tiny_job

from fedgrove.report import data
from fedgrove.start import run
from fedgrove.tracking.callback import RunInfo
from fedgrove.tracking.metrics import read
from fedgrove.tracking.scoreboard import Scoreboard


@pytest.fixture(scope="module")
def held_out(tiny_bert: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("validation") / "run"
    job = tiny_job(
        tiny_bert, silos, data={"validation_fraction": 0.3}, run={"rounds": 3, "eval_every": 2}
    )
    run(job, out)
    return out


def test_every_client_is_measured_where_the_run_is_evaluated(held_out: Path) -> None:
    lines = [line for line in read(held_out / "metrics.jsonl") if line["split"] == "validation"]
    names = ["site-0", "site-1", "site-2"]
    assert [(line["round"], line["client"]) for line in lines] == [
        (r, name) for r in (2, 3) for name in names
    ]
    assert [line["examples"] for line in lines[:3]] == [
        7,
        8,
        10,
    ]  # 30 % of 24, 28 and 32, none of them tested on
    assert all(0 <= line["accuracy"] <= 1 for line in lines)


def test_without_the_split_there_are_no_lines(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    run(tiny_job(tiny_bert, silos, run={"rounds": 1}), tmp_path / "run")
    assert {line["split"] for line in read(tmp_path / "run" / "metrics.jsonl")} == {"train", "test"}


def test_the_report_and_the_live_view_look_at_the_test_split_alone(held_out: Path) -> None:
    lines = read(held_out / "metrics.jsonl")
    tests = {(x["round"], x["client"]): x["accuracy"] for x in lines if x["split"] == "test"}
    loaded = data.load(held_out)
    assert {
        (r, name): value for r, each in loaded.history.items() for name, value in each.items()
    } == tests
    assert loaded.test_sizes == [6, 7, 8]
    board = Scoreboard(
        RunInfo("fedit", "FedIT", 3, ("site-0", "site-1", "site-2"), held_out), lambda: 0.0
    )
    last = [line for line in lines if line["round"] == 3 and line["split"] != "train"]
    score = board.evaluate(3, last)
    assert score is not None
    assert score.mean == pytest.approx(sum(v for (r, _), v in tests.items() if r == 3) / 3)
