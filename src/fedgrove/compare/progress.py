"""Progress of a comparison: one bar over all runs with the present run's state; plain lines where
no terminal is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedgrove.ground import words
from fedgrove.tracking.callback import Callback, Line, RunInfo
from fedgrove.tracking.display import PlainProgress, score_cells
from fedgrove.tracking.scoreboard import Scoreboard

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Overall:
    """Counts runs. In a terminal a bar that is redrawn, elsewhere a heading and the plain progress
    of each run.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False, markup=False)
        real = getattr(self.console.file, "isatty", lambda: False)()
        self.live = bool(real and self.console.is_terminal and not self.console.is_dumb_terminal)
        self.total = self.done = 0
        self._bar: Progress | None = None
        self._task: Any = None

    @contextmanager
    def over(self, total: int) -> Iterator[None]:
        """``total`` runs are to come."""
        self.total, self.done = total, 0
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
            BarColumn(bar_width=24, complete_style="cyan", finished_style="cyan"),
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
        if self._bar is None and not skipped:
            self.say(f"[{self.done + 1}/{self.total}] {title}")
        yield _Inner(self, title) if self._bar is not None else PlainProgress(self.console)
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=title)
        if skipped or self._bar is not None:
            if skipped:
                how = "done before"
            else:
                how = f"done in {words.duration(time.monotonic() - started)}"
            self.say(f"[{self.done}/{self.total}] {title}: {how}")

    def state(self, text: str, share: float) -> None:
        """The present run: what it does, and how much of it is done (0 to 1)."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done + share, description=text)

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


class _Inner(Callback):
    """One run's state in one line beside the bar."""

    def __init__(self, overall: Overall, title: str) -> None:
        self.overall, self.title = overall, title
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

    def round_done(self, round: int, summary: Mapping[str, Any]) -> None:
        if self.board:
            self.board.end_round()

    def _show(self, phase: str = "") -> None:
        board, cells, share = self.board, [self.title], 0.0
        if board and board.round:
            share = (board.info.start_round - 1 + board.worked) / board.info.rounds
            cells.append(f"round {board.round}/{board.info.rounds}")
            if not phase and board.running:
                cells.append(f"client {board.done}/{board.selected}")
            cells += score_cells(board.score)[:1] if board.score else []
        cells += [phase] if phase else []
        self.overall.state(" | ".join(cells), min(share, 1.0))
