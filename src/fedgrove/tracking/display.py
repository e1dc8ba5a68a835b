"""What the two progress displays share, and the plain one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.ground import words
from fedgrove.ground.plain import Given
from fedgrove.tracking.callback import Callback, Line, RunInfo
from fedgrove.tracking.scoreboard import Clock, Score, Scoreboard

if TYPE_CHECKING:
    from rich.console import Console


MOST_LOST = 5  # clients of a round that are named where they are lost


class Display(Callback):
    """Keeps the scoreboard and prints the last line. Hooks before ``run_started`` (loading) find
    ``board`` None.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self.board: Scoreboard | None = None
        self._started = clock()
        self._lost_round = 0
        self._lost = 0

    def run_started(self, info: RunInfo) -> None:
        self.board = Scoreboard(info, self.clock)

    def remark(self, text: str) -> None:
        self.line(text)

    def client_lost(self, round: int, client: str, what: str, reason: str) -> None:
        if round != self._lost_round:
            self._tell_rest()
            self._lost_round = round
        self._lost += 1
        if self._lost <= MOST_LOST:
            self.remark(f"round {round}: {client} {what}: {reason}")

    def _tell_rest(self) -> None:
        """How many more clients were lost than had a line of their own."""
        rest = self._lost - MOST_LOST
        self._lost = 0
        if rest > 0:
            more = words.count(rest, "more client")
            self.remark(f"round {self._lost_round}: {more} lost; events.jsonl names all of them")

    def round_started(self, round: int, clients: Sequence[str]) -> None:
        if self.board:
            self.board.start_round(round, clients)

    def client_done(self, round: int, line: Line) -> None:
        if self.board:
            self.board.client(line)

    def evaluated(self, round: int, lines: Sequence[Line]) -> None:
        if self.board:
            self.board.evaluate(round, lines)

    def round_done(self, round: int, summary: Given) -> None:
        self._tell_rest()
        if self.board:
            self.board.end_round()

    def run_finished(self, summary: Given, out: Path) -> None:
        self._tell_rest()
        self.close()
        rounds = words.count(summary["rounds"], "round")
        seconds = self.clock() - self._started
        self.line(f"finished {rounds} in {words.duration(seconds)}")

    def run_stopped(self, round: int, reason: str) -> None:
        self._tell_rest()
        self.close()
        of = ""
        if self.board:
            of = f" of {self.board.info.rounds}"
        self.line(f"stopped after round {round}{of}: {reason}")

    def line(self, text: str) -> None:
        """One line, never wrapped or coloured, at once; what the stream's encoding lacks becomes a
        question mark.
        """
        file = self.console.file
        encoding = getattr(file, "encoding", None) or "utf-8"
        encoded = text.encode(encoding, "replace")
        file.write(encoded.decode(encoding) + "\n")
        file.flush()


class PlainProgress(Display):
    """One line per round, and one per phase outside rounds. No control characters."""

    def run_started(self, info: RunInfo) -> None:
        super().run_started(info)
        resumed = ""
        if info.start_round > 1:
            resumed = f", from round {info.start_round}"
        clients = words.count(len(info.clients), "client")
        rounds = words.count(info.rounds, "round")
        self.line(f"{info.title} | {clients}, {rounds}{resumed} | {info.out}")

    def phase(self, name: str, total: int | None = None) -> None:
        if self.board and self.board.running:
            return
        if total is not None:
            name = f"{name} ({total})"
        self.line(name)

    def evaluated(self, round: int, lines: Sequence[Line]) -> None:
        if self.board is None:
            return
        score = self.board.evaluate(round, lines)
        if score and not self.board.running:  # inside a round it is part of the round's line
            cells = [f"evaluated after round {round}", *score_cells(score)]
            self.line(" | ".join(cells))

    def round_done(self, round: int, summary: Given) -> None:
        super().round_done(round, summary)
        if self.board is None:
            return
        board = self.board
        cells = [
            f"round {round}/{board.info.rounds}",
            words.count(board.done, "client"),
            f"loss {words.number(board.loss)}",
        ]
        if board.score and board.score.round == round:
            cells += score_cells(board.score)
        cells.append(f"up {words.size(board.bytes_up)}")
        cells.append(f"down {words.size(board.bytes_down)}")
        epsilon = summary.get("epsilon")
        if epsilon is not None:
            cells.append(f"epsilon {epsilon:.3g}")
        cells.append(words.duration(board.round_seconds))
        left = board.seconds_left()
        if round < board.info.rounds and left is not None:
            cells.append(f"{words.duration(left)} left")
        self.line(" | ".join(cells))


def score_cells(score: Score) -> list[str]:
    """``["accuracy 61.2 % (+1.3)", "tail 42.0 % (-0.5)"]``; changes are in points since the
    evaluation before.
    """
    percent = score.percent
    mean = _score_cell(score.metric, score.mean, score.mean_change, percent)
    tail = _score_cell("tail", score.tail, score.tail_change, percent)
    return [mean, tail]


def _score_cell(
    name: str,
    value: float,
    change: float | None,
    percent: bool,
) -> str:
    cell = f"{name} {words.score(value, percent=percent)}"
    if change is None:
        return cell
    since = words.change(change, percent=percent)
    return f"{cell} ({since})"
