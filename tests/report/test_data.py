from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgrove.ground.errors import RunError
from fedgrove.report.data import load

from .conftest import MakeRun


def test_a_run_is_read_from_its_files(make_run: MakeRun) -> None:
    run = load(make_run("run", clients=6, held_out=2, rounds=3))
    assert (len(run.clients), len(run.newcomers)) == (6, 2)
    assert run.metric == "accuracy"
    assert run.percent
    assert list(run.history) == [1, 2, 3]
    assert set(run.history[3]) == set(run.clients)
    assert run.history[3] == run.values("metric")
    assert all(len(losses) == 6 for losses in run.losses.values())
    assert run.data_name == "sentiment"
    assert run.setting("lora", "rank") == 8
    assert run.notes == ()


def test_a_run_without_a_summary_is_not_finished(make_run: MakeRun) -> None:
    path = make_run("run", clients=3)
    (path / "summary.json").unlink()
    with pytest.raises(RunError, match=r"has no summary\.json.*--resume"):
        load(path)


def test_missing_and_broken_files_become_notes(make_run: MakeRun) -> None:
    path = make_run("run", clients=3)
    (path / "job.toml").write_text("[model\n")
    (path / "federation.json").write_text("{")
    (path / "metrics.jsonl").unlink()
    (path / "versions.json").unlink()
    run = load(path)
    assert [note.split()[0] for note in run.notes] == [
        "job.toml",
        "metrics.jsonl",
        "federation.json",
    ]
    assert run.history == {}
    assert run.setting("model", "name") is None
    assert run.metric == "accuracy"


def test_losses_that_are_no_numbers_are_counted_by_client(make_run: MakeRun) -> None:
    run = load(make_run("run", clients=3, rounds=4, nan_losses=True))
    assert run.broken == {"amazon-0": 2}
    assert [len(losses) for losses in run.losses.values()] == [3, 3, 2, 2]


def test_the_name_of_the_data_is_that_of_its_source(make_run: MakeRun) -> None:
    path = make_run("run", clients=3)
    table = json.loads((path / "federation.json").read_text())
    table["source"] = {"source": "silos", "name": "wards"}
    (path / "federation.json").write_text(json.dumps(table))
    assert load(path).data_name == "wards"


def test_another_file_is_no_summary(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(RunError, match="not the summary of a run"):
        load(tmp_path)
