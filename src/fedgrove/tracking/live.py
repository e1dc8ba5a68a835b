"""Progress for people: a live view in a terminal, plain lines everywhere else.

Live needs a real terminal that can move its cursor; a pipe, a log file, ``TERM=dumb`` and a
notebook get plain lines.
``NO_COLOR`` keeps the live view and drops its colours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedgrove.ground import words
from fedgrove.ground.plain import Given
from fedgrove.tracking.callback import Callback, Line, RunInfo
from fedgrove.tracking.display import Display, PlainProgress, score_cells
from fedgrove.tracking.scoreboard import Clock

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_WIDEST = 100  # columns; a wider bar says nothing more
_REMARK = 18  # columns right of the bars: time left, the client that finished last
_LABEL = 32  # columns left of the bars, at most
_BAR = "cyan"


def progress(console: Console | None = None) -> Callback:
    """The display that fits ``console`` (default: standard output)."""
    from rich.console import Console

    console = console or Console(highlight=False)
    # FORCE_COLOR makes rich call a pipe a terminal
    is_a_terminal = getattr(console.file, "isatty", lambda: False)
    if is_a_terminal() and console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console)
    return PlainProgress(console)


class _Row(NamedTuple):
    """One bar: ``total`` None is work of unknown length."""

    label: str
    total: int | None
    done: float
    shown: int  # the whole number printed beside the bar
    remark: str = ""

    @property
    def position(self) -> str:
        if self.total is None:
            if self.shown:
                return str(self.shown)
            return ""
        return f"{self.shown}/{self.total}"


class LiveProgress(Display):
    """Two bars and the numbers, redrawn in place and gone at the end."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        super().__init__(console, clock)
        self._live: Live | None = None
        self._phase: tuple[str, int | None] | None = None
        self._steps = 0
        self._last_client = ""

    def run_started(self, info: RunInfo) -> None:
        super().run_started(info)
        self._show()

    def phase(self, name: str, total: int | None = None) -> None:
        self._phase = (name, total)
        self._steps = 0
        self._show()

    def phase_advanced(self) -> None:
        self._steps += 1

    def remark(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def round_started(self, round: int, clients: Sequence[str]) -> None:
        super().round_started(round, clients)
        self._phase = None
        self._last_client = ""
        self._show()

    def client_done(self, round: int, line: Line) -> None:
        super().client_done(round, line)
        self._phase = None
        self._last_client = str(line["client"])

    def round_done(self, round: int, summary: Given) -> None:
        super().round_done(round, summary)
        self._phase = None

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(
                self,
                console=self.console,
                transient=True,
                refresh_per_second=5,
            )
            self._live.start()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _WIDEST)
        if self.board is not None:
            yield _title(self.board.info, width)
        rows = list(self._rows())
        if rows:
            yield _bars(rows, width)
        if self.board is not None:
            yield from _packed(self._cells(), width)

    def _rows(self) -> Iterator[_Row]:
        board = self.board
        if board is not None and board.round:
            left = board.seconds_left()
            done = board.info.start_round - 1 + board.worked
            remark = ""
            if left:
                remark = f"{words.duration(left)} left"
            yield _Row("round", board.info.rounds, done, board.round, remark)
        if self._phase is not None:
            name, total = self._phase
            yield _Row(name, total, self._steps, self._steps)
        elif board is not None and board.selected:
            yield _Row("clients", board.selected, board.done, board.done, self._last_client)

    def _cells(self) -> list[Text]:
        from rich.text import Text

        assert self.board is not None
        board = self.board
        cells = []
        if board.loss is not None:
            loss = words.number(board.loss)
            cells.append(Text(f"loss {loss}"))
        if board.score:
            for text in score_cells(board.score):
                cell = Text(text)
                cell.highlight_regex(r"(?<= )[\d.]+( %)?", "bold")
                cell.highlight_regex(r"\(\+.*\)", "green")
                cell.highlight_regex(r"\(-.*\)", "red")
                cells.append(cell)
        best = board.best
        if best:
            score = words.score(best.mean, percent=best.percent)
            cells.append(Text(f"best {score} in round {best.round}"))
        if board.bytes_up or board.bytes_down:
            up = words.size(board.bytes_up)
            down = words.size(board.bytes_down)
            cells.append(Text(f"up {up}", style="dim"))
            cells.append(Text(f"down {down}", style="dim"))
        return cells


def _title(info: RunInfo, width: int) -> Text:
    """The title, and the run directory beside it where it fits."""
    from rich.text import Text

    title = Text(
        info.title,
        style="bold",
        no_wrap=True,
        overflow="ellipsis",
    )
    out = Text(f"  {info.out}", style="dim not bold")
    if title.cell_len + out.cell_len <= width:
        return Text.assemble(title, out, no_wrap=True)
    return title


def _bars(rows: Sequence[_Row], width: int) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    longest = max(len(row.label) for row in rows)
    label = min(_LABEL, width // 2 - 4, longest)
    position = max(len(row.position) for row in rows)
    remark = 0
    if width >= 60:
        remark = _REMARK
    bar = max(6, width - label - position - remark - 6)
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(
        width=label,
        no_wrap=True,
        overflow="ellipsis",
    )
    table.add_column(
        width=position,
        no_wrap=True,
        justify="right",
    )
    table.add_column(width=bar)
    if remark:
        table.add_column(
            width=remark,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in rows:
        drawn = ProgressBar(
            total=row.total,
            completed=row.done,
            width=bar,
            pulse=row.total is None,
            complete_style=_BAR,
            finished_style=_BAR,
            pulse_style=_BAR,
        )
        cells: list[RenderableType] = [Text(row.label), Text(row.position), drawn]
        if remark:
            cells.append(Text(row.remark, style="dim"))
        table.add_row(*cells)
    return table


def _packed(cells: Sequence[Text], width: int) -> Iterator[Text]:
    """As many cells on a line as fit, three spaces apart: a number is never torn from its name."""
    from rich.text import Text

    line: list[Text] = []
    for cell in cells:
        taken = sum(each.cell_len + 3 for each in line)
        if line and taken + cell.cell_len > width:
            yield Text("   ").join(line)
            line = []
        line.append(cell)
    if line:
        yield Text("   ").join(line)
