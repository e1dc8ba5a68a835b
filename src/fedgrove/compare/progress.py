"""Progress of a comparison: one bar over all runs with the present run's state; plain lines where
no terminal is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedgrove.ground import words
from fedgrove.ground.plain import Given
from fedgrove.tracking.callback import Callback, Line, RunInfo
from fedgrove.tracking.display import PlainProgress, score_cells
from fedgrove.tracking.scoreboard import Scoreboard

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Overall:
    """Counts runs. In a terminal a bar that is redrawn, elsewhere a heading and the plain progress
    of each run.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False, markup=False)
        is_a_terminal = getattr(self.console.file, "isatty", lambda: False)
        moves = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = bool(is_a_terminal() and moves)
        self.total = 0
        self.done = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    @contextmanager
    def over(self, total: int) -> Iterator[None]:
        """``total`` runs are to come."""
        self.total = total
        self.done = 0
        if not self.live:
            yield
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            MofNCompleteColumn(),
            BarColumn(
                bar_width=24,
                complete_style="cyan",
                finished_style="cyan",
            ),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=total)
            yield
        self._bar = None

    @contextmanager
    def step(self, title: str, *, skipped: bool) -> Iterator[Callback]:
        """One run; yields the callback that watches it."""
        started = time.monotonic()
        if self._bar is not None:
            yield _Inner(self, title)
        else:
            if not skipped:
                self.say(f"[{self.done + 1}/{self.total}] {title}")
            yield PlainProgress(self.console)
        self.done += 1
        self.state(title, 0.0)
        if skipped or self._bar is not None:
            how = "done before"
            if not skipped:
                seconds = time.monotonic() - started
                how = f"done in {words.duration(seconds)}"
            self.say(f"[{self.done}/{self.total}] {title}: {how}")

    def state(self, text: str, share: float) -> None:
        """The present run: what it does, and how much of it is done (0 to 1)."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done + share, description=text)

    def say(self, text: str) -> None:
        self.console.print(
            text,
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


class _Inner(Callback):
    """One run's state in one line beside the bar."""

    def __init__(self, overall: Overall, title: str) -> None:
        self.overall = overall
        self.title = title
        self.board: Scoreboard | None = None

    def run_started(self, info: RunInfo) -> None:
        self.board = Scoreboard(info, time.monotonic)

    def phase(self, name: str, total: int | None = None) -> None:
        self._show(name)

    def round_started(self, round: int, clients: Sequence[str]) -> None:
        if self.board:
            self.board.start_round(round, clients)
            self._show()

    def client_done(self, round: int, line: Line) -> None:
        if self.board:
            self.board.client(line)
            self._show()

    def evaluated(self, round: int, lines: Sequence[Line]) -> None:
        if self.board:
            self.board.evaluate(round, lines)
            self._show()

    def round_done(self, round: int, summary: Given) -> None:
        if self.board:
            self.board.end_round()

    def _show(self, phase: str = "") -> None:
        board = self.board
        cells = [self.title]
        share = 0.0
        if board and board.round:
            rounds = board.info.rounds
            done = board.info.start_round - 1 + board.worked
            share = done / rounds
            cells.append(f"round {board.round}/{rounds}")
            if not phase and board.running:
                cells.append(f"client {board.done}/{board.selected}")
            if board.score:
                metric, _ = score_cells(board.score)
                cells.append(metric)
        if phase:
            cells.append(phase)
        self.overall.state(" | ".join(cells), min(share, 1.0))
