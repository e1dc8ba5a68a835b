from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedgrove.ground import files
from fedgrove.ground.errors import RunError
from fedgrove.tracking import summary

SECONDS = {"server": 1.0, "total": 4.0, "training": 2.0, "evaluation": 1.0}
PARAMETERS = {"trained": [10, 20], "stored": [10, 20, 30], "sent_up": [5, 5], "sent_down": []}


def client(metric: float | None = 0.5, **more: Any) -> dict[str, Any]:
    return {"examples": 60, "rank": 8, "metric_base": 0.25, "metric": metric, "loss": 0.75, **more}


def make(clients: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return summary.summarise(
        method="fedit", task="classify-text", seed=3, rounds=8, clients=clients, parameters=PARAMETERS,
        bytes_up=100, bytes_down=200, seconds=SECONDS,
    )  # fmt: skip


def test_the_keys_are_those_of_the_contract_in_a_fixed_order() -> None:
    found = make({"b": client(), "a": client(metric_tuned=0.75)})
    assert list(found) == [
        "method", "task", "seed", "rounds", "clients", "mean", "std", "tail10", "parameters", "bytes", "seconds"
    ]  # fmt: skip
    assert list(found["clients"]) == ["a", "b"]
    assert list(found["clients"]["a"]) == [
        "examples",
        "rank",
        "metric_base",
        "metric",
        "metric_tuned",
        "loss",
    ]
    assert found["clients"]["a"]["metric_tuned"] == 0.75
    assert found["clients"]["b"]["metric_tuned"] is None
    assert found["bytes"] == {"up": 100, "down": 200}
    assert list(found["seconds"]) == ["total", "training", "evaluation", "server"]


def test_parameters_are_medians() -> None:
    assert make({"a": client()})["parameters"] == {
        "trained": 15,
        "stored": 20,
        "sent_up": 5,
        "sent_down": 0,
    }


def test_statistics_by_hand() -> None:
    found = make(
        {name: client(value) for name, value in zip("abcd", (0.0, 0.5, 0.5, 1.0), strict=True)}
    )
    assert found["mean"] == 0.5
    assert found["std"] == pytest.approx(math.sqrt(0.125))  # population, not sample
    assert found["tail10"] == pytest.approx(0.15)  # 0.3 of the way from the lowest to the second


def test_held_out_clients_count_apart() -> None:
    found = make(
        {"a": client(0.5), "b": client(1.0, held_out=True), "c": client(0.0, held_out=True)}
    )
    assert found["mean"] == 0.5
    assert found["std"] == 0.0
    assert found["unseen"] == {"clients": 2, "mean": 0.5, "std": 0.5, "tail10": pytest.approx(0.1)}
    tuned = {
        "b": client(0.5, held_out=True) | {"metric_tuned": 0.8},
        "c": client(held_out=True) | {"metric_tuned": 0.4},
    }
    assert make({"a": client(), **tuned})["unseen"]["tuned"]["mean"] == pytest.approx(0.6)
    assert found["clients"]["b"]["held_out"] is True
    assert "held_out" not in found["clients"]["a"]
    assert "held_out" not in make({"a": client(held_out=False)})["clients"]["a"]


def test_missing_values_are_left_out_and_never_nan_in_the_file(tmp_path: Path) -> None:
    found = make({"a": client(None), "b": client(0.5, loss=math.nan), "c": client(math.inf)})
    assert found["clients"]["b"]["loss"] is None
    assert found["clients"]["c"]["metric"] is None
    assert found["mean"] == 0.5
    nobody = make({"a": client(None)})
    assert (nobody["mean"], nobody["std"], nobody["tail10"]) == (None, None, None)
    files.write_json(tmp_path / "summary.json", nobody)
    assert summary.read(tmp_path / "summary.json") == nobody


def test_floats_are_written_so_that_they_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    files.write_json(path, {"clients": {}, "mean": 0.1 + 0.2, "name": "ü"})
    assert "0.30000000000000004" in path.read_text(encoding="utf-8")
    assert "ü" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_summary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with pytest.raises(RunError, match=r"has no summary\.json: the run is not finished"):
        summary.read(path)
    path.write_text("{")
    with pytest.raises(RunError, match="cannot read"):
        summary.read(path)
    path.write_text(json.dumps({"clients": []}))
    with pytest.raises(RunError, match="not the summary of a run"):
        summary.read(path)
