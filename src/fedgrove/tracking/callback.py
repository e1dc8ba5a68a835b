"""What the round loop tells the outside world. The loop calls these hooks and knows nothing of
progress, logs or plots.

Order inside a round: ``round_started``, ``client_done`` for each client as it finishes (any order),
``evaluated`` where the round is evaluated, ``round_done``. Work outside rounds (loading, base
heads, export) is a ``phase``. A run ends with ``run_finished`` or ``run_stopped``; ``close`` comes
last in either case, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedgrove.ground.plain import Given

#: One line of ``metrics.jsonl``, e.g. ``{"round": 3, "client": "tweets-0", "split": "train",
#: "loss": 0.81, ...}``.
Line = Given


@dataclass(frozen=True)
class RunInfo:
    """What is about to run, in plain data."""

    method: str  # "fedit"
    title: str  # one line for people, e.g. "fedit · minilm · sentiment"
    rounds: int  # of the whole run
    # names of the clients that train; the means in the display are over these
    clients: tuple[str, ...]
    out: Path
    job: Given = field(default_factory=dict)  # the resolved job
    start_round: int = 1  # first round that will run, 1-based; > 1 after a resume


class Callback:
    """Hooks that do nothing: override those that matter. A hook must not change what it is
    given.
    """

    def run_started(self, info: RunInfo) -> None:
        """Once, before anything else."""

    def phase(self, name: str, total: int | None = None) -> None:
        """Work outside training begins, of ``total`` steps if known; any hook but
        ``phase_advanced`` ends it.
        """

    def phase_advanced(self) -> None:
        """One step of the present phase is done."""

    def remark(self, text: str) -> None:
        """What a user should know about the run, in one sentence; may come before
        ``run_started``.
        """

    def round_started(self, round: int, clients: Sequence[str]) -> None:
        """``clients`` are those selected for this round (1-based)."""

    def client_done(self, round: int, line: Line) -> None:
        """``line`` is the client's ``"split": "train"`` line of metrics.jsonl."""

    def client_lost(self, round: int, client: str, what: str, reason: str) -> None:
        """A client is not part of the round: ``what`` became of it ("left out"), and why, as words
        for people.
        """

    def client_event(
        self,
        round: int,
        client: str,
        what: str,
        reason: str,
        trace: str = "",
    ) -> None:
        """Anything that happened to a client beside training, for a log: what ``client_lost`` tells
        people too, and what they need not be told ("joined", "late"). ``trace``: the client's own
        traceback, where it sent one.
        """

    def evaluated(self, round: int, lines: Sequence[Line]) -> None:
        """One line per client and split, all of ``round`` (0 = before the first round)."""

    def round_done(self, round: int, summary: Given) -> None:
        """The round's models are complete; ``summary`` is whatever the loop wants to say about it
        (may be empty).
        """

    def run_finished(self, summary: Given, out: Path) -> None:
        """``summary`` is the content of summary.json."""

    def run_stopped(self, round: int, reason: str) -> None:
        """The run ends early; ``round`` is the last complete round, ``reason`` a short clause for
        people.
        """

    def close(self) -> None:
        """Release the terminal and open files. May be called twice."""


class Callbacks(Callback):
    """Several callbacks as one, called in the order given (metrics before checkpoints, see
    ``MetricsLog``).
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = tuple(callbacks)

    def run_started(self, info: RunInfo) -> None:
        for each in self.callbacks:
            each.run_started(info)

    def phase(self, name: str, total: int | None = None) -> None:
        for each in self.callbacks:
            each.phase(name, total)

    def phase_advanced(self) -> None:
        for each in self.callbacks:
            each.phase_advanced()

    def remark(self, text: str) -> None:
        for each in self.callbacks:
            each.remark(text)

    def round_started(self, round: int, clients: Sequence[str]) -> None:
        for each in self.callbacks:
            each.round_started(round, clients)

    def client_done(self, round: int, line: Line) -> None:
        for each in self.callbacks:
            each.client_done(round, line)

    def client_lost(self, round: int, client: str, what: str, reason: str) -> None:
        for each in self.callbacks:
            each.client_lost(round, client, what, reason)

    def client_event(
        self,
        round: int,
        client: str,
        what: str,
        reason: str,
        trace: str = "",
    ) -> None:
        for each in self.callbacks:
            each.client_event(round, client, what, reason, trace)

    def evaluated(self, round: int, lines: Sequence[Line]) -> None:
        for each in self.callbacks:
            each.evaluated(round, lines)

    def round_done(self, round: int, summary: Given) -> None:
        for each in self.callbacks:
            each.round_done(round, summary)

    def run_finished(self, summary: Given, out: Path) -> None:
        for each in self.callbacks:
            each.run_finished(summary, out)

    def run_stopped(self, round: int, reason: str) -> None:
        for each in self.callbacks:
            each.run_stopped(round, reason)

    def close(self) -> None:
        for each in self.callbacks:
            each.close()
