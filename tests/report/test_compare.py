from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedgrove.report import compare
from fedgrove.report.data import load

from .conftest import MakeRun


def set_metrics(
    path: Path, values: Mapping[str, tuple[float | None, float | None]], **more: Any
) -> Path:
    """Give clients (metric_base, metric) in a run's summary.json."""
    summary = json.loads((path / "summary.json").read_text())
    for name, (base, metric) in values.items():
        summary["clients"][name] |= {"metric_base": base, "metric": metric}
    (path / "summary.json").write_text(json.dumps(summary | more))
    return path


def test_gains_are_against_training_alone_where_it_is_given(make_run: MakeRun) -> None:
    names = {"amazon-0": (0.25, 0.75), "amazon-1": (0.5, 0.25), "amazon-2": (0.5, 0.5)}
    run = load(set_metrics(make_run("fedit", clients=3), names))
    local = load(
        set_metrics(make_run("local", method="local", clients=3), dict.fromkeys(names, (0.5, 0.5)))
    )
    assert compare.compare(run, []).gains() == {"amazon-0": 0.5, "amazon-2": 0.0, "amazon-1": -0.25}
    both = compare.compare(run, [local])
    assert both.gains() == {"amazon-0": 0.25, "amazon-2": 0.0, "amazon-1": -0.25}
    assert [row.kind for row in both.rows] == ["base", "local", "ours"]
    assert both.rows[2].worst == "amazon-1"
    said = " ".join(compare.verdict(run, both))
    assert "1 of 3 clients is better off than alone, 1 worse, 1 unchanged." in said
    assert "went from 41.7\u202f% (untouched base) to 50.0\u202f%" in said
    assert (
        "Training alone reaches 50.0\u202f%: taking part changes nothing on average and costs 20.0 "
        "points" in said
    )


def test_another_method_is_the_reference_where_nobody_trained_alone(make_run: MakeRun) -> None:
    run = load(make_run("new", clients=3))
    other = load(
        set_metrics(make_run("older", method="ffa-lora", clients=3), {"amazon-0": (0.5, 0.5)})
    )
    comparison = compare.compare(run, [other])
    assert comparison.reference is not None
    assert comparison.reference.label == "Together: ffa-lora"
    assert "than in older" in " ".join(compare.verdict(run, comparison))


def test_without_a_baseline_the_verdict_does_not_claim_that_taking_part_pays(
    make_run: MakeRun,
) -> None:
    run = load(make_run("run", clients=3))
    said = " ".join(compare.verdict(run, compare.compare(run, [])))
    assert "does not say whether taking part beats training alone" in said


def test_a_local_run_is_not_compared_with_training_alone(make_run: MakeRun) -> None:
    run = load(make_run("local", method="local", clients=3))
    comparison = compare.compare(run, [run])
    assert comparison.local is None
    assert "Nothing was exchanged" in " ".join(compare.verdict(run, comparison))


def test_what_differs_in_a_baseline_is_said(make_run: MakeRun) -> None:
    run = load(make_run("run", clients=4))
    fewer = make_run("fewer", method="local", clients=3, seed=1)
    (fewer / "job.toml").write_text(
        '[data]\nname = "other"\n[model]\nname = "minilm"\nhead = "pooled"\n'
    )
    strangers = load(make_run("strangers", names=["x", "y"]))
    comparison = compare.compare(run, [load(fewer), strangers])
    text = " ".join(comparison.warnings)
    assert "fewer has only 3 of the 4 clients" in text
    assert "ran with seed 1, this run with 0" in text
    assert "fewer ran with another [data] section" in text
    assert "[model]" not in text
    assert "strangers has no client in common" in text
    assert [row.kind for row in comparison.rows] == ["base", "local", "ours"]


def test_missing_metrics_are_left_out(make_run: MakeRun) -> None:
    path = set_metrics(
        make_run("run", clients=3), {"amazon-0": (None, 0.5), "amazon-1": (0.5, None)}
    )
    run = load(path)
    comparison = compare.compare(run, [])
    assert set(comparison.ours.values) == {"amazon-0", "amazon-2"}
    assert set(comparison.gains()) == {"amazon-2"}
    nobody = load(set_metrics(path, {f"amazon-{n}": (None, None) for n in range(3)}))
    assert "nothing to compare" in compare.verdict(nobody, compare.compare(nobody, []))[0]


def test_tuned_and_unseen_rows(make_run: MakeRun) -> None:
    run = load(make_run("run", clients=3, held_out=2, tuned=True))
    assert [row.kind for row in compare.compare(run, []).rows] == ["base", "ours", "tuned"]
    arrived, tuned = compare.unseen(run)
    assert set(arrived.values) == set(tuned.values) == set(run.newcomers)
    assert arrived.values != tuned.values
    assert compare.unseen(load(make_run("none", clients=3))) == []


def test_the_grain_is_the_worth_of_one_example(make_run: MakeRun) -> None:
    path = make_run("run", clients=1, rounds=1)
    line = {"round": 1, "client": "amazon-0", "split": "test", "accuracy": 0.5, "examples": 40}
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "about 40 test examples, so a single one is worth 2.5 points" in compare.grain(
        load(path)
    )
    (path / "metrics.jsonl").unlink()
    assert compare.grain(load(path)) == ""


@pytest.mark.parametrize(
    ("difference", "said"),
    [(0.01, "adds 1.0 point"), (-0.02, "costs 2.0 points"), (0.0001, "changes nothing")],
)
def test_effects_in_words(difference: float, said: str) -> None:
    assert compare._effect(difference, percent=True) == said
