"""Curves elsewhere: TensorBoard, Weights & Biases and MLflow as callbacks. They are extras, and off
unless asked for.

What is logged, at each evaluated round: mean, tail (10th percentile) and worst client of the task's
metric, the mean loss of training and test, and the bytes so far. No text, no weights, and no
client's own numbers leave the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedgrove.ground.errors import RunError
from fedgrove.ground.plain import Given
from fedgrove.ground.statistics import mean, tail10
from fedgrove.tracking.callback import Callback, Line, RunInfo

Curves = dict[str, float]


class Tracker(Callback):
    """Turns what the loop says into named numbers by round; where they go is ``write``."""

    def __init__(self) -> None:
        self._losses: list[float] = []

    def client_done(self, round: int, line: Line) -> None:
        loss = line.get("loss", math.nan)
        if math.isfinite(loss):
            self._losses.append(float(loss))

    def evaluated(self, round: int, lines: Sequence[Line]) -> None:
        self.write(round, curves(lines))

    def round_done(self, round: int, summary: Given) -> None:
        found: Curves = {}
        for key, value in summary.items():
            if isinstance(value, int | float):
                found[f"traffic/{key}"] = float(value)
        if self._losses:
            found["train/loss"] = mean(self._losses)
            self._losses.clear()
        self.write(round, found)

    def write(self, round: int, found: Curves) -> None:
        raise NotImplementedError


def curves(lines: Iterable[Line]) -> Curves:
    """``{"test/accuracy": mean, "test/accuracy tail": …, "test/accuracy worst": …, "test/loss":
    mean, …}``.
    """
    found: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key in ("round", "client", "split", "examples"):
                continue
            if isinstance(value, int | float):
                curve = found.setdefault(f"{line['split']}/{key}", [])
                curve.append(float(value))
    result: Curves = {}
    for name, values in found.items():
        result[name] = mean(values)
        if not name.endswith(("loss", "perplexity")):
            result[f"{name} tail"] = tail10(values)
            result[f"{name} worst"] = min(values)
    return result


class TensorBoard(Tracker):
    """Event files in ``RUN/tensorboard``: ``tensorboard --logdir runs`` shows all runs beside each
    other.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RunError(
                "--track tensorboard needs the package tensorboard; install fedgrove[tensorboard]."
            ) from None
        self._open: Callable[[str], Any] = SummaryWriter
        self._writer: Any = None

    def run_started(self, info: RunInfo) -> None:
        self._writer = self._open(str(info.out / "tensorboard"))

    def write(self, round: int, found: Curves) -> None:
        for name, value in found.items():
            self._writer.add_scalar(name, value, round)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, named after the run directory; ``WANDB_MODE=offline`` keeps it on
    this machine.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            import wandb
        except ImportError:
            raise RunError(
                "--track wandb needs the package wandb; install fedgrove[wandb]."
            ) from None
        self._wandb: Any = wandb
        self._run: Any = None

    def run_started(self, info: RunInfo) -> None:
        try:
            self._run = self._wandb.init(
                project="fedgrove", name=info.out.name, config=dict(info.job), dir=str(info.out), resume="allow",
                id=_identity(info.out), settings=self._wandb.Settings(silent=True),
            )  # fmt: skip
        except Exception as error:  # its own errors: no key, no network
            raise RunError(
                f"--track wandb: Weights & Biases cannot start ({_reason(error)}); log in with `wandb "
                f"login`, or set "
                "WANDB_MODE=offline."
            ) from error

    def write(self, round: int, found: Curves) -> None:
        self._run.log(found, step=round)

    def run_finished(self, summary: Given, out: Path) -> None:
        for key in ("mean", "std", "tail10"):
            if key in summary:
                self._run.summary[key] = summary[key]

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class MLflow(Tracker):
    """A run in MLflow's experiment "fedgrove", named after the run directory; where it goes is
    MLflow's own setting, ``MLFLOW_TRACKING_URI``.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            import mlflow
        except ImportError:
            raise RunError(
                "--track mlflow needs the package mlflow; install fedgrove[mlflow]."
            ) from None
        self._mlflow: Any = mlflow
        self._open = False
        self._status = "FAILED"  # until the loop says otherwise

    def run_started(self, info: RunInfo) -> None:
        try:
            self._start(info)
        except Exception as error:  # its own errors: no server, no permission, another active run
            raise RunError(
                f"--track mlflow: MLflow cannot start ({_reason(error)}); look at "
                "MLFLOW_TRACKING_URI."
            ) from error

    def _start(self, info: RunInfo) -> None:
        identity = _identity(info.out)
        self._mlflow.set_experiment("fedgrove")
        before = self._mlflow.search_runs(
            experiment_names=["fedgrove"],
            filter_string=f"tags.fedgrove_directory = '{identity}'",
            output_format="list",
        )
        if before:
            self._mlflow.start_run(run_id=before[0].info.run_id)
        else:
            tags = {"fedgrove_directory": identity, "method": info.method}
            self._mlflow.start_run(run_name=info.out.name, tags=tags)
        self._open = True
        self._mlflow.log_dict(dict(info.job), "job.json")

    def write(self, round: int, found: Curves) -> None:
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        if finite:
            self._mlflow.log_metrics(finite, step=round)

    def run_finished(self, summary: Given, out: Path) -> None:
        self._status = "FINISHED"
        for key in ("mean", "std", "tail10"):
            if summary.get(key) is not None:
                self._mlflow.log_metric(key, summary[key])

    def run_stopped(self, round: int, reason: str) -> None:
        self._status = "KILLED"

    def close(self) -> None:
        if self._open:
            self._mlflow.end_run(status=self._status)
            self._open = False


def _reason(error: Exception) -> str:
    """The first line of an error of another package."""
    said = str(error).strip()
    if said:
        return said.splitlines()[0]
    return type(error).__name__


def _identity(out: Path) -> str:
    """The same run directory continues the same run."""
    import hashlib

    path = str(out.resolve())
    digest = hashlib.sha256(path.encode()).hexdigest()
    return digest[:12]


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def trackers(names: Sequence[str]) -> list[Tracker]:
    """The trackers by name. Raises ``RunError`` for an unknown name, or one whose package is
    missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise RunError(f"--track {name} is unknown; there are: {', '.join(TRACKERS)}.")
    return [TRACKERS[name]() for name in dict.fromkeys(names)]
