"""Files of JSON lines, such as ``RUN/metrics.jsonl``: the one writer of what only grows.

Every line is strict JSON; a number that is not finite is written as ``null``. A line is on disk
before the writer goes on. What a crash cut short stays visible, and does not swallow the next line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fedgrove.ground import files
from fedgrove.ground.errors import RunError

Line = Mapping[str, Any]
_BLOCK = 65536  # bytes


class Log:
    """A file of lines, open for one writer. ``last``: its last line, without its end."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.last = _last_line(file)

    def write(self, line: Line) -> None:
        self.last = dump(line).encode()
        self._file.write(self.last + b"\n")


@contextmanager
def appending(path: Path) -> Iterator[Log]:
    """The file, locked against other processes; on disk when the block ends. Raises ``RunError``
    where it cannot be written.
    """
    try:
        with path.open("ab+") as file:
            _lock(file.fileno())  # released with the file
            log = Log(file)
            if log.last and not _is_whole(file):
                file.write(b"\n")
            yield log
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise files.unwritable(path, error) from error


def append(path: Path, *lines: Line) -> None:
    """More lines at the end of the file."""
    with appending(path) as log:
        for line in lines:
            log.write(line)


def dump(line: Line) -> str:
    """A line without its end."""
    clean = {key: _written(value) for key, value in line.items()}
    return json.dumps(clean, ensure_ascii=False, allow_nan=False)


def read(path: Path, needs: Collection[str] = ("round",)) -> list[dict[str, Any]]:
    """All lines in the file's order; [] where it is missing. A half-written last line is left out.

    Raises ``RunError`` for any other line that is no JSON object with the keys ``needs``, of which
    ``round`` is a whole number.
    """
    return [line for line, _ in _scan(path, needs)]


def truncate_after(path: Path, round: int, needs: Collection[str] = ("round",)) -> None:
    """Drop the lines of rounds later than ``round`` and a half-written last line, in place and
    atomically.
    """
    if not path.exists():
        return
    kept = [text for line, text in _scan(path, needs) if line["round"] <= round]
    files.write_text(path, "".join(kept))


def _scan(path: Path, needs: Collection[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every complete line with its text as it stands in the file."""
    try:
        rows = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(
            f"cannot read {path} ({error.strerror or error}): check its permissions."
        ) from error
    for number, row in enumerate(rows, start=1):
        if not row.endswith(b"\n"):
            # the writer was killed here: the line is not complete even if it happens to parse
            return
        line = _parsed(row)
        if line is None or not set(needs) <= line.keys() or not isinstance(line["round"], int):
            raise RunError(
                f"{path} line {number} is no JSON object with {', '.join(needs)}: restore the "
                "file, or start the run again in a new directory."
            )
        yield line, row.decode("utf-8")


def _parsed(row: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(row)
    except ValueError:
        return None
    if isinstance(line, dict):
        return line
    return None


def _written(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _last_line(file: IO[bytes]) -> bytes:
    """Read backwards from the end of the file, a block at a time."""
    position = file.seek(0, os.SEEK_END)
    data = b""
    while position > 0 and b"\n" not in data[:-1]:
        step = min(_BLOCK, position)
        position -= step
        file.seek(position)
        data = file.read(step) + data
    file.seek(0, os.SEEK_END)
    return data.removesuffix(b"\n").rsplit(b"\n", 1)[-1]


def _is_whole(file: IO[bytes]) -> bool:
    """Whether the last line of a file that has one is complete."""
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:  # elsewhere one writer at a time is the user's to keep
        return
    fcntl.flock(handle, fcntl.LOCK_EX)
