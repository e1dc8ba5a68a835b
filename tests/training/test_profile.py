"""A profile adds up, and costs nothing where none is made."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from tests.tiny import tiny_job

from fedgrove.start import run
from fedgrove.training import profile


def test_without_a_profile_a_span_is_one_and_the_same_nothing() -> None:
    assert profile.span("forward") is profile.span("backward")
    assert isinstance(profile.round_span(1), nullcontext)


def test_a_run_is_accounted_for(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_bert, silos, run={"rounds": 2})
    with profile.profiling() as recorded:
        run(job, tmp_path / "run")
    shown = profile.save(tmp_path / "profile.json", recorded)
    content = json.loads((tmp_path / "profile.json").read_text())
    seconds = content["seconds"]
    assert [row["round"] for row in content["rounds"]] == [1, 2]
    for row in content["rounds"]:
        parts = row["seconds"]
        assert {
            "training",
            "training/forward",
            "training/backward",
            "server",
            "evaluation",
            "checkpoint",
        } <= set(parts)
        assert (
            sum(parts[name] for name in ("training", "server", "evaluation", "checkpoint"))
            <= parts["rounds"]
        )
        assert parts["training/forward"] + parts["training/backward"] <= parts["training"]
    assert seconds["rounds"] == pytest.approx(
        sum(row["seconds"]["rounds"] for row in content["rounds"])
    )
    top = [name for name in seconds if "/" not in name and name != "total"]
    assert set(top) == {"loading model and data", "rounds", "finish"}
    assert 0.5 * seconds["total"] < sum(seconds[name] for name in top) <= seconds["total"]
    assert content["peak_mb"] > 50
    assert "the whole run" in shown
    assert profile.span("after") is profile.span("it"), "the profile ended with its block"


def test_rows_are_sorted_and_say_what_is_left() -> None:
    rows = profile.rows({"a": 1.0, "b": 5.0, "b/x": 1.0, "b/y": 3.0})
    assert rows == [
        (0, "b", 5.0),
        (1, "y", 3.0),
        (1, "x", 1.0),
        (1, "everything else", 1.0),
        (0, "a", 1.0),
    ]
