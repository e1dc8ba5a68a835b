"""The running numbers behind the progress display: pure bookkeeping, no terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fedgrove.ground.statistics import mean, tail10
from fedgrove.ground.words import shares
from fedgrove.tracking.callback import Line, RunInfo
from fedgrove.tracking.metrics import metric_name

Clock = Callable[[], float]


@dataclass(frozen=True)
class Score:
    """One evaluation: mean and 10th-percentile client, and the changes since the evaluation before
    (or None).
    """

    round: int
    metric: str
    mean: float
    tail: float
    percent: bool  # shown as a percentage: every client's value lies between 0 and 1
    mean_change: float | None = None
    tail_change: float | None = None


@dataclass
class Scoreboard:
    """Fed by the hooks of a ``Callback``. ``clock`` returns seconds; only differences of it are
    used.
    """

    info: RunInfo
    clock: Clock
    round: int = 0
    running: bool = False  # inside a round
    selected: int = 0  # clients of the present round
    done: int = 0  # of them
    loss: float | None = None  # mean over the clients done in the present or last round
    bytes_up: int = 0  # this session, all rounds
    bytes_down: int = 0
    score: Score | None = None
    best: Score | None = None
    complete: int = 0  # rounds completed in this session
    round_seconds: float = 0.0  # of the last complete round
    _losses: list[float | None] = field(default_factory=list)
    _first: float | None = None  # when the first round began
    _began: float = 0.0  # when the present round began

    def start_round(self, round: int, clients: Sequence[str]) -> None:
        self._began = self.clock()
        if self._first is None:
            self._first = self._began
        self.round = round
        self.running = True
        self.selected = len(clients)
        self.done = 0
        self._losses = []

    def client(self, line: Line) -> None:
        self.done += 1
        self._losses.append(line.get("loss"))
        self.loss = mean(self._losses)
        self.bytes_up += line.get("bytes_up", 0)
        self.bytes_down += line.get("bytes_down", 0)

    def evaluate(self, round: int, lines: Sequence[Line]) -> Score | None:
        """Takes the "test" lines of the clients that train; None where there are none."""
        names = set(self.info.clients)
        tests = [line for line in lines if line["split"] == "test" and line["client"] in names]
        metrics = filter(None, map(metric_name, tests))
        metric = next(metrics, None)
        if metric is None:
            return None
        values = [line.get(metric) for line in tests]
        now = Score(
            round=round,
            metric=metric,
            mean=mean(values),
            tail=tail10(values),
            percent=shares(values),
        )
        before = self.score
        if before is not None and not math.isnan(before.mean + now.mean):
            now = replace(
                now,
                mean_change=now.mean - before.mean,
                tail_change=now.tail - before.tail,
            )
        self.score = now
        better = self.best is None or now.mean > self.best.mean
        if better and not math.isnan(now.mean):
            self.best = now
        return now

    def end_round(self) -> None:
        self.complete += 1
        self.running = False
        self.round_seconds = self.clock() - self._began

    @property
    def worked(self) -> float:
        """Rounds done in this session; the present one counts by its clients."""
        if not self.running or not self.selected:
            return self.complete
        return self.complete + self.done / self.selected

    def seconds_left(self) -> float | None:
        """From the pace so far; None before the first client is done."""
        worked = self.worked
        if self._first is None or worked <= 0:
            return None
        left = self.info.rounds - self.info.start_round + 1 - worked
        seconds = self.clock() - self._first
        return max(0.0, seconds / worked * left)
