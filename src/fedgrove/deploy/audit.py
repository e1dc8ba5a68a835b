"""A site's log of every message: what came, what left, how large, with its SHA-256. Never a value,
never a text.

One JSON object a line, in ``audit.jsonl``. Each line carries the SHA-256 of the line before it, so
that a line that was changed, removed or put between others is found by ``broken`` (what was cut off
at the end is not: for that, note the number of lines and the last hash elsewhere).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedgrove.adapters.tree import leaves
from fedgrove.ground import lines

LOG = "audit.jsonl"  # in the site's folder
_START = "0" * 64

Direction = Literal["received", "sent"]


@dataclass(frozen=True)
class LogEntry:
    """One message, as the log tells it."""

    time: str
    run: str
    round: int
    direction: Direction
    kind: str
    bytes: int
    sha256: str
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]  # path, dtype, shape
    note: str = ""

    @property
    def when(self) -> str:
        """The time (UTC) for people."""
        return self.time.removesuffix("+00:00").replace("T", " ")

    @property
    def numbers(self) -> int:
        """How many numbers the message's tensors hold."""
        return sum(math.prod(shape) for _, _, shape in self.tensors)


class AuditLog:
    """Appends to one site's log. Every line is on disk before the message is used or sent."""

    def __init__(self, path: Path):
        self.path = path

    def write(
        self,
        *,
        run: str,
        round: int,
        direction: Direction,
        kind: str,
        blob: bytes,
        tree: object = None,
        note: str = "",
    ) -> None:
        """Log one message: ``blob`` as it travels, ``tree`` what it decodes to (None where it was
        not decoded).
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": run,
            "round": round,
            "direction": direction,
            "kind": kind,
            "bytes": len(blob),
            "sha256": hashlib.sha256(blob).hexdigest(),
            "tensors": describe(tree),
            "note": note,
        }
        with lines.appending(self.path) as log:
            os.chmod(self.path, 0o600)
            log.write({**line, "previous": _hash(log.last)})


def describe(tree: object) -> list[list[object]]:
    """``[[path, dtype, [shape]], ...]`` of a tree's tensors."""
    if tree is None:
        return []
    found: list[list[object]] = []
    for path, tensor in leaves(tree):
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append([path, dtype, list(tensor.shape)])
    return found


def read(path: Path) -> Iterator[LogEntry]:
    """The log's entries in order; a line that a crash cut short is passed over (``broken`` names
    it).
    """
    for raw in _lines(path):
        try:
            line = json.loads(raw)
            tensors = tuple(
                (name, dtype, tuple(shape)) for name, dtype, shape in line.pop("tensors")
            )
            line.pop("previous")
            yield LogEntry(tensors=tensors, **line)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue


def broken(path: Path) -> list[int]:
    """The numbers (from 1) of the lines that do not follow from the line before them, or are no
    entry.
    """
    found, before = [], b""
    for number, raw in enumerate(_lines(path), start=1):
        try:
            follows = json.loads(raw)["previous"] == _hash(before)
        except (ValueError, TypeError, KeyError):
            follows = False
        if not follows:
            found.append(number)
        before = raw
    return found


def _lines(path: Path) -> list[bytes]:
    if path.exists():
        return path.read_bytes().splitlines()
    return []


def _hash(before: bytes) -> str:
    """What a line says of the line before it."""
    if before:
        return hashlib.sha256(before).hexdigest()
    return _START
