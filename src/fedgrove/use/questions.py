"""What users hand a finished model, checked: rows out of questions, and rows that have their
answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgrove.federation.readers import Row, broken
from fedgrove.federation.tasks.base import Task
from fedgrove.federation.tasks.conversation import conversation
from fedgrove.ground.errors import DataError
from fedgrove.ground.plain import Given

_ANSWER = {"role": "assistant", "content": "?"}  # what a conversation that asks still lacks


def questions(task: Task, given: Sequence[Any]) -> list[Row]:
    """A row for each text, image or prompt. Raises ``DataError`` for what cannot be asked, with its
    number.
    """
    what = task.asks
    if not task.beside and any(isinstance(each, Mapping) and "context" in each for each in given):
        raise DataError(
            f"a context (--context) is for questions about it, and data.task = {task.name!r} has none; "
            "leave it out"
        )
    single = isinstance(given, str | bytes | Path | Mapping) or hasattr(
        given, "mode"
    )  # "mode": a PIL image
    if single or (what == "prompt" and any(isinstance(each, Mapping) for each in given)):
        raise DataError(
            f"what a model is asked is a list, of one {what} or more; put the one {what} into a "
            f"list"
        )
    rows = [_row(task, value, f"{what} {number}") for number, value in enumerate(given, start=1)]
    if not rows:
        raise DataError(f"the list is empty; ask about one {what} or more")
    return rows


def asked_about(texts: Sequence[str] | None, context: str | None) -> list[Any]:
    """What is asked on the command line: texts, or questions about one text."""
    given = list(texts or ())
    if context is None:
        return given
    return [{"question": text, "context": context} for text in given]


def answered(task: Task, rows: Sequence[Given]) -> list[Row]:
    """Rows to measure on. Raises ``DataError`` where there are none, or where one lacks its
    question or answer.
    """
    answer = task.learns
    parts = (task.asks, *task.beside, answer)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is no object; give rows with {_listed(parts)}")
        missing = [key for key in parts if key not in row]
        if missing and not {"messages", "plain"} & row.keys():
            raise DataError(f"row {number} has no {missing[0]!r}; give rows with {_listed(parts)}")
    if not rows:
        raise DataError("there are no rows to measure on; give one or more")
    return [dict(row) for row in rows]


def _row(
    task: Task,
    value: Any,
    place: str,
) -> Row:
    """What is asked, with what stands beside it."""
    what = task.asks
    if not task.beside:
        return {what: _question(value, what, place)}
    parts = (what, *task.beside)
    if not isinstance(value, Mapping) or not all(part in value for part in parts):
        raise DataError(
            f"{place} must be an object with {_listed(parts)} (on the command line --context TEXT, or a "
            "table with --data FILE)"
        )
    return {part: _question(value[part], part, f"{place}, {part}") for part in parts}


def _listed(parts: Sequence[str]) -> str:
    """ "'text' and 'label'" """
    *first, last = map(repr, parts)
    return f"{', '.join(first)} and {last}"


def _question(
    value: Any,
    what: str,
    place: str,
) -> Any:
    if what == "image" and not isinstance(value, str):
        return value  # looked at where it is opened
    if what == "prompt" and isinstance(value, list | tuple):
        return conversation([*value, _ANSWER], what, place)[:-1]
    if not isinstance(value, str):
        raise DataError(f"{place} is of the type {type(value).__name__}, not a text")
    if not value.strip():
        raise DataError(f"{place} is empty; leave it out")
    if half := broken(value):
        raise DataError(f"{place} has the broken character {half!a}; give it as UTF-8")
    return value
