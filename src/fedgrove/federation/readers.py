"""Reads data files row by row: JSON lines, CSV and Parquet. Every error names the file and the line
or row.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedgrove.ground.errors import DataError

Row = dict[str, Any]
Place = str  # where a row stands, for messages: "clinic-1.jsonl, line 3"
Values = dict[str, Any]  # one row as a source has it, by column
Found = Iterable[tuple[Place, Values]]


def records(path: Path, columns: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The rows of one file with the named columns, each with its place.

    Raises DataError: unknown kind of file, unreadable, damaged, a column missing (lists those
    present).
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise DataError(f"{path} is not a data file: give {', '.join(READERS)}")
    try:
        yield from READERS[kind](path, columns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:  # decoded line by line, so that the line can be named
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number} is not UTF-8 text; save the file as UTF-8"
                ) from error


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        line = line.strip()
        if not line:
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place} is not valid JSON: {error.msg} at column {error.colno}"
            ) from error
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number of thousands of digits, brackets without end
            what = (
                "nested too deeply"
                if isinstance(error, RecursionError)
                else "a number in it is too long"
            )
            raise DataError(
                f"{place} cannot be read as JSON ({what}); correct or remove the row"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{place} is not a JSON object with the columns as keys")
        _need(columns, record, place)
        yield place, {name: record[name] for name in columns}


def _csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KB
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{place} is not valid CSV: {error}") from error
        if not fields:
            continue
        if header is None:
            header = [name.strip() for name in fields]
            _need(columns, header, f"{path} (line 1)")
            if twice := sorted(name for name in columns if header.count(name) > 1):
                raise DataError(f"{path} has the column {twice[0]!r} twice; rename one of them")
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{place} has {len(fields)} fields, but the header has {len(header)}; quote the "
                f"commas"
            )
        values = dict(zip(header, fields, strict=True))
        yield place, {name: values[name] for name in columns}


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            _need(columns, file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(columns=list(columns)):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", values
    except (pyarrow.ArrowException, pyarrow.lib.ArrowInvalid) as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from error
    except OSError as error:
        if error.errno is not None:  # the file system's own
            raise
        raise DataError(
            f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from error


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
KINDS = ", ".join(READERS)


def _need(columns: Sequence[str], present: Any, place: Place) -> None:
    missing = [name for name in columns if name not in present]
    if missing:
        there = ", ".join(map(str, present)) or "none"
        chat = missing[0] in ("prompt", "completion") and "messages" in present
        hint = (
            'set data.messages = "messages" to learn conversations'
            if chat
            else "the [data] section names the columns"
        )
        raise DataError(f"{place} has no column {missing[0]!r}; it has: {there} ({hint})")


def text_of(value: Any, column: str, place: Place) -> str:
    """``value`` as a text with something in it. Raises DataError with its place."""
    if isinstance(value, str) and value.strip():
        return whole(value, column, place)
    what = (
        "is empty"
        if value is None or isinstance(value, str)
        else f"is a {type(value).__name__}, not a text"
    )
    raise DataError(f"{place}: the column {column!r} {what}; correct or remove the row")


def whole(text: str, column: str, place: Place) -> str:
    """``text``, unless it has half of a pair of characters ("\\ud83d"), which JSON can write and nothing can encode."""
    if half := broken(text):
        raise DataError(
            f"{place}: the column {column!r} has a broken character, {half!a}, which is half of a "
            f"pair; "
            "correct or remove the row"
        )
    return text


def broken(text: str) -> str:
    """The first character that nothing can encode, half of a pair; "" where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return ""


def label_of(value: Any, column: str, place: Place) -> str:
    """A class, group or other identifier as a text: ``3``, ``3.0`` and ``"3"`` are one, ``true`` is
    ``"true"``.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
        raise DataError(f"{place}: the column {column!r} is empty; correct or remove the row")
    if not isinstance(value, str | int | float):
        raise DataError(
            f"{place}: the column {column!r} holds a {type(value).__name__}, not one value"
        )
    return whole(str(value).strip(), column, place)


def fingerprint(paths: Sequence[Path]) -> str:
    """SHA-256 over the names and contents of the files, in name order."""
    whole = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as stream:
            whole.update(
                f"{path.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode()
            )
    return whole.hexdigest()
