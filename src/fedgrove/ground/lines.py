"""JSON lines by round, such as ``RUN/noise.jsonl``: written before the round's checkpoint, cut back
before a resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgrove.ground import files
from fedgrove.ground.errors import RunError


def append(path: Path, line: Mapping[str, Any]) -> None:
    """One more line, on disk before a checkpoint can know of its round."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise files.unwritable(path, error) from error


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of such a file; [] where it is missing. A half-written last line is left out.

    Raises ``RunError`` for any other line that is no JSON object with a round.
    """
    return [line for line, _ in _scan(path)]


def truncate_after(path: Path, round: int) -> None:
    """Drop the lines of rounds later than ``round`` and a half-written last line, in place and
    atomically.
    """
    if path.exists():
        files.write_text(
            path, "".join(text for line, text in _scan(path) if line["round"] <= round)
        )


def _scan(path: Path) -> list[tuple[dict[str, Any], str]]:
    if not path.exists():
        return []
    found = []
    for number, row in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not row.endswith(b"\n"):
            break
        try:
            line = json.loads(row)
            complete = isinstance(line["round"], int)
        except (ValueError, TypeError, KeyError):
            complete = False
        if not complete:
            raise RunError(
                f"{path} line {number} is no JSON object with a round: remove the file, or start "
                f"the run again."
            )
        found.append((line, row.decode("utf-8")))
    return found
