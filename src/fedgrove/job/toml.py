"""TOML in and out: a broken file is named with line and column; values are written the same way
every time.
"""

from __future__ import annotations

import re
import tomllib
from datetime import date, datetime, time
from typing import Any

from fedgrove.ground.errors import JobError
from fedgrove.ground.plain import Plain
from fedgrove.ground.toml import key_text, short, shown, value_text

__all__ = [
    "key_text",
    "parse_assignment",
    "parse_toml",
    "parse_value",
    "plain",
    "shown",
    "value_text",
]


def parse_toml(text: str, where: str) -> Plain:
    """The tables of a TOML text as plain data; raises ``JobError`` with the line, the column and
    the line's text.
    """
    try:
        return plain(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        problem, line, column = _position(str(error), text)
        lines = text.splitlines()
        if line <= len(lines):
            shown = lines[line - 1].strip()
        else:
            shown = ""
        if shown:
            there = f" in: {short(shown)}"
        else:
            there = ""
        bare = problem == "invalid value" and re.search(r"=\s*[A-Za-z]", shown)
        if bare:
            hint = "; text needs quotes"
        else:
            hint = ""
        raise JobError(
            f"{where}, line {line}, column {column}: broken TOML ({problem}{hint}){there}"
        ) from None
    except RecursionError:
        raise JobError(
            f"{where}: the TOML is nested too deeply; a job has at most a table in a section."
        ) from None


def plain(value: Any) -> Any:
    """TOML data without its dates, which no key takes: they stand as the text they were written
    as.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return value


def parse_assignment(text: str) -> tuple[tuple[str, ...], Any]:
    """``section.key=value`` as a path and a value. A bare word is a string; nothing after ``=`` is
    ``None``: unset.
    """
    key, equals, value = text.partition("=")
    if equals:
        path = _path(key)
    else:
        path = None
    if path is None:
        raise JobError(
            f"'{text}' is no setting; write section.key=value, for example train.lr=1e-3."
        )
    return path, None if not value.strip() else parse_value(value.strip())


def parse_value(text: str) -> Any:
    """A TOML value; what is none is a string, also within a list: ``[query, value]``."""
    try:
        table = tomllib.loads(f"value = {text}")
        if list(table) == ["value"]:
            return plain(table["value"])
    except (tomllib.TOMLDecodeError, RecursionError):
        if text.startswith("[") and text.endswith("]") and "[" not in text[1:] and '"' not in text:
            return [parse_value(item.strip()) for item in text[1:-1].split(",") if item.strip()]
    return text


def _path(key: str) -> tuple[str, ...] | None:
    """A dotted key, with TOML's quotes where a part has a dot of its own:
    ``federation.ranks."clinic.3"``.
    """
    try:
        node: Any = tomllib.loads(f"{key} = 0")
    except (tomllib.TOMLDecodeError, RecursionError):
        return None
    path: list[str] = []
    while isinstance(node, dict):
        if len(node) != 1:
            return None
        ((part, node),) = node.items()
        path.append(part)
    return tuple(path)


def _position(message: str, text: str) -> tuple[str, int, int]:
    """What, line and column out of tomllib's message, which is all that it offers before Python
    3.14.
    """
    found = re.search(r"\s*\(at line (\d+), column (\d+)\)$", message)
    if found:
        problem, line, column = message[: found.start()], int(found[1]), int(found[2])
    else:
        problem = re.sub(r"\s*\(at end of document\)$", "", message)
        line, column = text.count("\n") + 1, len(text.rsplit("\n", 1)[-1]) + 1
    return problem[:1].lower() + problem[1:], line, column
