"""``RUN/metrics.jsonl``: one JSON object per round, client and split.

The file does not depend on the order in which clients finish (``seconds`` aside): lines are sorted
by client inside a round, training before evaluation. Numbers that are not finite are written as
``null``: every line is strict JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgrove.ground import files
from fedgrove.ground.errors import RunError
from fedgrove.tracking.callback import Callback, Line, RunInfo

#: Keys of a line that are no score of the task. What remains on a "test" line is the metric, e.g.
#: "accuracy".
_NO_SCORE = frozenset(
    {"round", "client", "split", "loss", "examples", "steps", "bytes_up", "bytes_down", "seconds"}
)


def metric_name(line: Line) -> str | None:
    """The task's metric on an evaluation line ("accuracy"), None where the line carries none."""
    return next((key for key in line if key not in _NO_SCORE), None)


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
        self._open, self._lines = round, []

    def client_done(self, round: int, line: Line) -> None:
        self._lines.append(line)

    def evaluated(self, round: int, lines: Sequence[Line]) -> None:
        if round == self._open:
            self._lines.extend(lines)
        # before the first round or after round_done: a resume repeats it, and the lines may be
        # there already
        else:
            there = {_key(line) for line in read(self.path)}
            self._append([line for line in lines if _key(line) not in there])

    def round_done(self, round: int, summary: Mapping[str, Any]) -> None:
        lines, self._open, self._lines = self._lines, None, []
        self._append(lines)

    def _append(self, lines: Sequence[Line]) -> None:
        ordered = sorted(
            lines,
            key=lambda line: (line["split"] != "train", str(line["client"]), str(line["split"])),
        )
        text = "".join(_dump(line) + "\n" for line in ordered)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise files.unwritable(self.path, error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """All lines in file order; [] where the file is missing. A half-written last line is left out.

    Raises ``RunError`` for a line that is no JSON object with a round, a client and a split, unless
    it is the last.
    """
    return [line for line, _ in _scan(path)]


def truncate_after(path: Path, round: int) -> None:
    """Drop the lines of rounds later than ``round`` and a half-written last line, in place and
    atomically.
    """
    if not path.exists():
        return
    kept = "".join(text for line, text in _scan(path) if line["round"] <= round)
    files.write_text(path, kept)


def _scan(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Every complete line with its text as it stands in the file."""
    try:
        rows = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(
            f"cannot read {path} ({error.strerror or error}): check its permissions."
        ) from error
    found = []
    for number, row in enumerate(rows, start=1):
        if not row.endswith(b"\n"):
            # the writer was killed here: the line is not complete even if it happens to parse
            break
        try:
            text = row.decode("utf-8")
            line = json.loads(text)
            complete = isinstance(line["round"], int) and {"client", "split"} <= line.keys()
        except (ValueError, TypeError, KeyError, AttributeError):
            complete = False
        if not complete:
            if number == len(rows):
                break
            raise RunError(
                f"{path} line {number} is not a metrics line with round, client and split: "
                "restore the file, or start the run again in a new directory."
            )
        found.append((line, text))
    return found


def _key(line: Line) -> tuple[Any, Any, Any]:
    return line["round"], line["client"], line["split"]


def _dump(line: Line) -> str:
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(clean, ensure_ascii=False, allow_nan=False)
