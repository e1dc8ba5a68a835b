from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tests.tiny import tiny_job
from typer.testing import CliRunner

from fedgrove.ground.errors import RunError
from fedgrove.start import run
from fedgrove.tracking.callback import RunInfo
from fedgrove.tracking.trackers import TensorBoard, Tracker, curves, trackers


def line(client: str, accuracy: float, loss: float) -> dict[str, Any]:
    return {
        "round": 1,
        "client": client,
        "split": "test",
        "accuracy": accuracy,
        "loss": loss,
        "examples": 5,
    }


def test_curves_are_mean_tail_and_worst_of_the_clients() -> None:
    found = curves([line("a", 0.5, 1.0), line("b", 0.7, 3.0)])
    assert found == pytest.approx(
        {
            "test/accuracy": 0.6,
            "test/accuracy tail": 0.52,
            "test/accuracy worst": 0.5,
            "test/loss": 2.0,
        }
    )


class Written(Tracker):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def write(self, round: int, found: dict[str, float]) -> None:
        self.rows.append((round, found))


def test_training_loss_and_traffic_of_each_round() -> None:
    tracker = Written()
    for loss in (1.0, 3.0, float("nan")):
        tracker.client_done(1, {"client": "a", "split": "train", "loss": loss})
    tracker.round_done(1, {"bytes_up": 7, "bytes_down": 9})
    tracker.round_done(2, {"bytes_up": 7})
    assert tracker.rows == [
        (1, {"traffic/bytes_up": 7.0, "traffic/bytes_down": 9.0, "train/loss": 2.0}),
        (2, {"traffic/bytes_up": 7.0}),
    ]


def test_a_run_leaves_event_files_with_its_curves(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tiny_job(tiny_bert, silos), tmp_path / "out", callbacks=[TensorBoard()])
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    last = events.Scalars("test/accuracy")[-1]
    assert last.step == result.job.run.rounds
    clients = result.summary["clients"].values()
    assert last.value == pytest.approx(
        sum(row["metric"] for row in clients) / len(clients), abs=0.02
    )


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []

    class Run:
        summary: ClassVar[dict[str, Any]] = {}

        def log(self, found: dict[str, float], step: int) -> None:
            logged.append((step, found))

        def finish(self) -> None:
            logged.append("finished")

    class Wandb:
        Settings = dict

        @staticmethod
        def init(**options: Any) -> Run:
            logged.append((options["name"], options["id"], options["config"]))
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    (tracker,) = trackers(["wandb", "wandb"])
    tracker.run_started(RunInfo("fedit", "t", 2, ("a",), tmp_path / "out", {"run": {"seed": 0}}))
    tracker.evaluated(1, [line("a", 0.5, 1.0)])
    tracker.close()
    tracker.close()
    name, identity, config = logged[0]
    assert (name, config) == ("out", {"run": {"seed": 0}})
    assert len(identity) == 12
    assert logged[1][0] == 1
    assert logged[-1] == "finished"
    assert logged.count("finished") == 1


class Mlflow:
    """What the tracker calls of MLflow, and what it was called with."""

    def __init__(self, known: tuple[str, ...] = ()) -> None:
        self.known = known  # runs of this directory
        self.calls: list[tuple[str, Any]] = []

    def set_experiment(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def search_runs(self, **asked: Any) -> list[Any]:
        self.calls.append(("search", asked["filter_string"]))
        return [SimpleNamespace(info=SimpleNamespace(run_id=each)) for each in self.known]

    def start_run(self, **options: Any) -> None:
        self.calls.append(("start", options))

    def log_dict(self, content: dict[str, Any], file: str) -> None:
        self.calls.append((file, content))

    def log_metrics(self, found: dict[str, float], step: int) -> None:
        self.calls.append(("metrics", (step, found)))

    def log_metric(self, key: str, value: float) -> None:
        self.calls.append((key, value))

    def end_run(self, status: str) -> None:
        self.calls.append(("end", status))

    def said(self, what: str) -> list[Any]:
        return [content for name, content in self.calls if name == what]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    (tracker,) = trackers(["mlflow"])
    out = tmp_path / "out"
    tracker.run_started(RunInfo("fedit", "t", 2, ("a",), out, {"run": {"seed": 0}}))
    tracker.evaluated(1, [line("a", 0.5, float("nan"))])
    tracker.run_finished({"mean": 0.5, "std": None}, out)
    tracker.close()
    tracker.close()
    assert module.said("experiment") == ["fedgrove"]
    (started,) = module.said("start")
    assert started["run_name"] == "out"
    assert started["tags"]["fedgrove_directory"] in module.said("search")[0]
    assert module.said("job.json") == [{"run": {"seed": 0}}]
    ((step, found),) = module.said("metrics")
    assert step == 1
    assert found == {
        "test/accuracy": 0.5,
        "test/accuracy tail": 0.5,
        "test/accuracy worst": 0.5,
    }
    assert module.said("mean") == [0.5]
    assert module.said("std") == []
    assert module.said("end") == ["FINISHED"]


@pytest.mark.parametrize(("stopped", "status"), [(True, "KILLED"), (False, "FAILED")])
def test_mlflow_goes_on_with_the_run_of_a_directory(
    stopped: bool, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Mlflow(known=("r1",))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    (tracker,) = trackers(["mlflow"])
    tracker.run_started(RunInfo("fedit", "t", 2, ("a",), tmp_path, {}))
    if stopped:
        tracker.run_stopped(1, "interrupted")
    tracker.close()
    assert module.said("start") == [{"run_id": "r1"}]
    assert module.said("end") == [status]


def test_an_mlflow_that_cannot_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Mlflow()

    def refuse(name: str) -> None:
        raise ValueError("no server\nat all")

    module.set_experiment = refuse  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    (tracker,) = trackers(["mlflow"])
    with pytest.raises(RunError, match=r"cannot start \(no server\); look at MLFLOW_TRACKING_URI"):
        tracker.run_started(RunInfo("fedit", "t", 2, ("a",), tmp_path, {}))
    tracker.close()
    assert module.said("end") == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(RunError, match=f"install fedgrove\\[{name}\\]"):
        trackers([name])


def test_an_unknown_tracker_is_one_sentence(tmp_path: Path) -> None:
    from fedgrove.cli import app

    found = CliRunner().invoke(app, ["run", "--track", "comet", "--out", str(tmp_path / "out")])
    assert isinstance(found.exception, RunError)
    assert (
        str(found.exception) == "--track comet is unknown; there are: tensorboard, wandb, mlflow."
    )
    assert not (tmp_path / "out").exists()
