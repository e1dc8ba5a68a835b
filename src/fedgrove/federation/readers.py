"""Reads data files row by row: JSON, JSON lines, CSV and Parquet. Every error names the file and the
line or row.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.federation.otherwise import TOKENS, OtherRows, other_columns
from fedgrove.ground.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader as CsvReader

Row = dict[str, Any]
Place = str  # where a row stands, for messages: "clinic-1.jsonl, line 3"
Values = dict[str, Any]  # one row as a source has it, by column
Found = Iterable[tuple[Place, Values]]

#: the key of ``Values`` under which a source says what a row is for, where its files are for one
#: thing each: "train", "test" or "validation"
PURPOSE = "\0purpose"

#: marks at the start of a file that say how its text is encoded
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEADER = 1 << 16  # characters in which a table's header ends
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass
class Remarks:
    """What was found out about files that a user may want to know, by what it is."""

    files: dict[str, list[str]] = field(default_factory=dict)

    def say(self, what: str, file: str) -> None:
        self.files.setdefault(what, []).append(file)

    def sentences(self) -> list[str]:
        """One for each thing, with the first files that it is true of."""
        return [f"{_some(files)}: {what}." for what, files in self.files.items()]


def _some(files: Sequence[str]) -> str:
    if len(files) <= 3:
        return ", ".join(files)
    return f"{', '.join(files[:2])} and {len(files) - 2} more files"


@dataclass(frozen=True)
class Reading:
    """One file, the columns wanted of it, how its text is encoded where its start does not say, and
    where to say what was found out.
    """

    path: Path
    columns: Sequence[str]
    encoding: str = "utf-8"
    remarks: Remarks = field(default_factory=Remarks)

    def place(self, number: int, what: str = "row") -> Place:
        return f"{self.path}, {what} {number}"

    def kept(self, values: Values) -> Values:
        return {name: values[name] for name in self.columns}


def records(
    path: Path,
    columns: Sequence[str],
    encoding: str | None = None,
    remarks: Remarks | None = None,
) -> Iterator[tuple[Place, Values]]:
    """The rows of one file with the named columns, each with its place.

    Raises DataError: unknown kind of file, unreadable, damaged, a column missing (lists those
    present).
    """
    kind = path.suffix.lower()
    if kind not in READERS:
        raise DataError(f"{path} is not a data file: give {KINDS}")
    reading = Reading(
        path,
        columns,
        _known(encoding or "utf-8"),
        remarks or Remarks(),
    )
    try:
        yield from READERS[kind](reading)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _known(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise DataError(
            f"data.encoding = {encoding!r} is no encoding of text; name one such as utf-8 or cp1252"
        ) from None


# ------------------------------------------------------------------------ text
def _text(reading: Reading) -> str:
    """The whole text of a file, by the mark at its start or the encoding that the job names."""
    content = reading.path.read_bytes()
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    encoding = _MARKS.get(mark, reading.encoding)
    if mark and encoding != "utf-8-sig":
        reading.remarks.say(
            f"read as {encoding.upper()}, as the mark at its start says",
            _name(reading),
        )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_in(encoding, reading.place(line, "line")) from error


def _not_in(encoding: str, place: Place) -> DataError:
    if encoding.startswith("utf-8"):
        return DataError(
            f"{place} is not UTF-8 text; save the file as UTF-8, or name what it is in "
            'data.encoding, such as "cp1252" (Excel in western Europe)'
        )
    return DataError(f"{place} is no text in {encoding}; correct data.encoding or the file")


def _name(reading: Reading) -> str:
    return reading.path.name


def _lines(reading: Reading) -> Iterator[str]:
    with reading.path.open("rb") as stream:
        mark = stream.read(4)
    if any(mark.startswith(other) for other in _MARKS) or reading.encoding != "utf-8":
        yield from io.StringIO(_text(reading))
        return
    with reading.path.open(
        "rb"
    ) as stream:  # line by line, so that a large file takes little memory
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise _not_in("utf-8", reading.place(number, "line")) from error


# ------------------------------------------------------------------------ JSON
def _jsonl(reading: Reading) -> Iterator[tuple[Place, Values]]:
    """An object on each line; or a list of them, which some tools call so too."""
    if _opens_a_list(reading):
        yield from _json(reading)
        return
    for number, line in enumerate(_lines(reading), start=1):
        line = line.strip()
        if line:
            place = reading.place(number, "line")
            yield place, _object(_parsed(line, place), reading, place)


def _opens_a_list(reading: Reading) -> bool:
    looked = replace(reading, remarks=Remarks())  # what is found out is said where rows are read
    first = next((line.strip() for line in _lines(looked) if line.strip()), "")
    return first.startswith("[")


def _json(reading: Reading) -> Iterator[tuple[Place, Values]]:
    """A list of objects; or JSON lines, which many call so too."""
    text = _text(reading)
    if text.lstrip().startswith("{"):
        yield from _lines_or_one(text, reading)
        return
    rows = _parsed(text, str(reading.path))
    if not isinstance(rows, list):
        raise DataError(f"{reading.path} is no list of objects with the columns as keys")
    for number, row in enumerate(rows, start=1):
        place = reading.place(number)
        yield place, _object(row, reading, place)


def _lines_or_one(text: str, reading: Reading) -> Iterator[tuple[Place, Values]]:
    """Objects, one on each line. Raises DataError for one object over several lines."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        record = json.loads(first)
    except ValueError:
        raise DataError(
            f"{reading.path} is one object, not a list of objects with the columns as keys; give "
            "the list alone, or an object on each line"
        ) from None
    if not rest.strip():
        _refuse_outer(record, reading)
    yield from _jsonl(reading)


def _parsed(text: str, place: Place) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        where = where if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{place} is not valid JSON: {error.msg} at {where}") from error
    except (ValueError, RecursionError) as error:
        # a number of thousands of digits, brackets without end
        deep = isinstance(error, RecursionError)
        what = "nested too deeply" if deep else "a number in it is too long"
        raise DataError(
            f"{place} cannot be read as JSON ({what}); correct or remove the row"
        ) from error


def _object(
    record: object,
    reading: Reading,
    place: Place,
) -> Values:
    if not isinstance(record, dict):
        raise DataError(f"{place} is not a JSON object with the columns as keys")
    _need(reading.columns, record, place)
    return reading.kept(record)


def _refuse_outer(record: object, reading: Reading) -> None:
    """Raises DataError for the one object of a file that holds all rows: in a list, or by column."""
    if not isinstance(record, dict):
        return
    inner = [key for key, value in record.items() if _is_rows(value)]
    if len(inner) == 1 and inner[0] not in ("messages", "conversations", *reading.columns):
        raise DataError(
            f"{reading.path} has its rows inside {inner[0]!r}; give that list alone, or an object "
            "on each line"
        )
    columns = [record.get(name) for name in reading.columns]
    if columns and all(isinstance(value, dict) and "0" in value for value in columns):
        raise DataError(
            f"{reading.path} holds columns of rows, as pandas writes them by default; write it "
            'with to_json(path, orient="records", lines=True)'
        )


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


# ------------------------------------------------------------------------ CSV
def _csv(reading: Reading) -> Iterator[tuple[Place, Values]]:
    text = _text(reading)
    separator = _separator(text, reading.columns)
    if separator != ",":
        reading.remarks.say(f"read as separated by {_SEPARATORS[separator]}", _name(reading))
    yield from _separated(text, separator, reading)


def _tsv(reading: Reading) -> Iterator[tuple[Place, Values]]:
    yield from _separated(_text(reading), "\t", reading)


def _separator(text: str, columns: Sequence[str]) -> str:
    """The sign that makes the wanted columns of the header, a comma before others; where none does,
    the one that makes most fields.
    """
    headers = {sign: _header(text[:HEADER], sign) for sign in _SEPARATORS}
    for sign, header in headers.items():
        if all(name in header for name in columns):
            return sign
    return max(headers, key=lambda sign: len(headers[sign]))


def _header(text: str, separator: str) -> list[str]:
    try:
        for fields in _table(text, separator):
            if fields:
                return [name.strip() for name in fields]
    except csv.Error:  # said where the rows are read
        pass
    return []


def _table(text: str, separator: str) -> CsvReader:
    """A reader of the text's rows, without the line with which Excel names the separator."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KB
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=separator, strict=True)
    if text[:4].lower() == "sep=":
        next(reader)
    return reader


def _separated(
    text: str,
    separator: str,
    reading: Reading,
) -> Iterator[tuple[Place, Values]]:
    reader = _table(text, separator)
    header: list[str] | None = None
    while True:
        place = reading.place(reader.line_num + 1, "line")
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{place} is not valid CSV: {error}") from error
        if not fields:
            continue
        if header is None:
            header = _checked_header(fields, reading, reader.line_num)
        elif len(fields) == len(header):
            yield place, reading.kept(dict(zip(header, fields, strict=True)))
        else:
            raise DataError(
                f"{place} has {len(fields)} fields, but the header has {len(header)}; quote the "
                f"{_SEPARATORS[separator]}"
            )


def _checked_header(
    fields: Sequence[str],
    reading: Reading,
    line: int,
) -> list[str]:
    header = [name.strip() for name in fields]
    _need(reading.columns, header, f"{reading.path} (line {line})")
    for name in reading.columns:
        if header.count(name) > 1:
            raise DataError(f"{reading.path} has the column {name!r} twice; rename one of them")
    return header


# ------------------------------------------------------------------------ Parquet
def _parquet(reading: Reading) -> Iterator[tuple[Place, Values]]:
    import pyarrow
    import pyarrow.parquet

    path = reading.path
    try:
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            _need(reading.columns, file.schema_arrow.names, str(path))
            batches = file.iter_batches(columns=list(reading.columns))
            rows = (values for batch in batches for values in batch.to_pylist())
            for number, values in enumerate(rows, start=1):
                yield reading.place(number), values
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


READERS: dict[str, Callable[[Reading], Iterator[tuple[Place, Values]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
KINDS = ", ".join(READERS)


def _need(
    columns: Sequence[str],
    present: Collection[str],
    place: Place,
) -> None:
    missing = [name for name in columns if name not in present]
    if not missing:
        return
    there = ", ".join(map(str, present)) or "none"
    sentence = f"{place} has no column {missing[0]!r}; it has: {there}"
    if kind := other_columns(present):
        raise OtherRows(sentence, kind)
    raise DataError(f"{sentence} ({_hint(missing[0], present)})")


def _hint(missing: str, present: Collection[str]) -> str:
    """What to do about a column that is not there."""
    if missing in ("prompt", "completion"):
        for column in ("messages", "conversations"):
            if column in present:
                return f'set data.messages = "{column}" to learn conversations'
        if "instruction" in present and "output" in present:
            inputs = "\\n\\n{input}" if "input" in present else ""
            return (
                f'set data.template = "{{instruction}}{inputs}" and data.completion = "output" to '
                "learn instructions"
            )
        if "text" in present:
            return 'set data.plain = "text" to learn plain texts'
    return "the [data] section names the columns"


def text_of(
    value: object,
    column: str,
    place: Place,
) -> str:
    """``value`` as a text with something in it. Raises DataError with its place."""
    if isinstance(value, str) and value.strip():
        return whole(value, column, place)
    if isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value):
        if any(" " in each.strip() for each in value):
            raise DataError(
                f"{place}: the column {column!r} is a list of {len(value)} texts; give a row for "
                "each of them"
            )
        raise OtherRows(f"{place}: the column {column!r} is a list of words, not a text", TOKENS)
    if value is None or isinstance(value, str):
        what = "is empty"
    else:
        what = f"is a {type(value).__name__}, not a text"
    raise DataError(f"{place}: the column {column!r} {what}; correct or remove the row")


def whole(
    text: str,
    column: str,
    place: Place,
) -> str:
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


def label_of(
    value: object,
    column: str,
    place: Place,
) -> str:
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


def fingerprint(paths: Sequence[Path], folder: Path | None = None) -> str:
    """SHA-256 over the names and contents of the files, in name order; names below ``folder``."""
    named = {path.relative_to(folder).as_posix() if folder else path.name: path for path in paths}
    whole = hashlib.sha256()
    for name in sorted(named):
        with named[name].open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{name}\0{content}\0".encode())
    return whole.hexdigest()
