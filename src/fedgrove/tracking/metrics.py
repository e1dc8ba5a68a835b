"""``RUN/metrics.jsonl``: one JSON object per round, client and split.

The file does not depend on the order in which clients finish (``seconds`` aside): lines are sorted
by client inside a round, training before evaluation. Numbers that are not finite are written as
``null``: every line is strict JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedgrove.ground import lines
from fedgrove.ground.plain import Given, Plain
from fedgrove.tracking.callback import Callback, Line, RunInfo

_NEEDS = ("round", "client", "split")  # keys of every line
#: Keys of a line that are no score of the task. What remains on a "test" line is the metric, e.g.
#: "accuracy".
_NO_SCORE = frozenset(
    {
        "round",
        "client",
        "split",
        "loss",
        "examples",
        "steps",
        "bytes_up",
        "bytes_down",
        "seconds",
    }
)


def metric_name(line: Line) -> str | None:
    """The task's metric on an evaluation line ("accuracy"), None where the line carries none."""
    for key in line:
        if key not in _NO_SCORE:
            return key
    return None


class MetricsLog(Callback):
    """Appends to ``path``; a round reaches the disk (fsync) in ``round_done``.

    Place it before the checkpoint writer: a checkpoint of round t then implies that the lines of
    round t are on disk. A resume drops the lines of rounds that the checkpoint has not seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: int | None = None  # the round in progress
        self._lines: list[Line] = []

    def run_started(self, info: RunInfo) -> None:
        truncate_after(self.path, info.start_round - 1)

    def round_started(self, round: int, clients: Sequence[str]) -> None:
        self._open = round
        self._lines = []

    def client_done(self, round: int, line: Line) -> None:
        self._lines.append(line)

    def evaluated(self, round: int, found: Sequence[Line]) -> None:
        if round == self._open:
            self._lines.extend(found)
            return
        # before the first round or after round_done: a resume repeats it, and the lines may be
        # there already
        there = {_key(line) for line in read(self.path)}
        self._append([line for line in found if _key(line) not in there])

    def round_done(self, round: int, summary: Given) -> None:
        done = self._lines
        self._open = None
        self._lines = []
        self._append(done)

    def _append(self, found: Sequence[Line]) -> None:
        in_order = sorted(found, key=_place)
        lines.append(self.path, *in_order)


def read(path: Path) -> list[Plain]:
    """All lines in file order; [] where the file is missing. A half-written last line is left out.

    Raises ``RunError`` for a line that is no JSON object with a round, a client and a split.
    """
    return lines.read(path, _NEEDS)


def truncate_after(path: Path, round: int) -> None:
    """Drop the lines of rounds later than ``round`` and a half-written last line, in place and
    atomically.
    """
    lines.truncate_after(path, round, _NEEDS)


def _place(line: Line) -> tuple[bool, str, str]:
    """Where a line stands in its round."""
    client = str(line["client"])
    split = str(line["split"])
    return split != "train", client, split


def _key(line: Line) -> tuple[object, ...]:
    return tuple(line[key] for key in _NEEDS)
