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
    if task.rows_each > 1 and any(isinstance(each, Mapping) for each in given):
        return [_compared(task, each, f"pair {number}") for number, each in enumerate(given, 1)]
    single = isinstance(given, str | bytes | Path | Mapping) or hasattr(
        given, "mode"
    )  # "mode": a PIL image
    if single or (what == "prompt" and any(isinstance(each, Mapping) for each in given)):
        raise DataError(
            f"what a model is asked is a list, of one {what} or more; put the one {what} into a "
            f"list"
        )
    rows = [
        {what: _question(value, what, f"{what} {number}")}
        for number, value in enumerate(given, start=1)
    ]
    if not rows:
        raise DataError(f"the list is empty; ask about one {what} or more")
    return rows


def answered(task: Task, rows: Sequence[Given]) -> list[Row]:
    """Rows to measure on. Raises ``DataError`` where there are none, or where one lacks its
    question or answer.
    """
    answer = task.learns
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {number} is no object; give rows with {task.asks!r} and {answer!r}"
            )
        missing = [key for key in (task.asks, answer) if key not in row]
        if missing and not {"messages", "plain"} & row.keys():
            raise DataError(
                f"row {number} has no {missing[0]!r}; give rows with {task.asks!r} and {answer!r}"
            )
    if not rows:
        raise DataError("there are no rows to measure on; give one or more")
    return [dict(row) for row in rows]


def _compared(
    task: Task,
    value: Any,
    place: str,
) -> Row:
    """Two answers to compare, ``{"prompt", "chosen", "rejected"}``."""
    settings = task.Options()
    wanted = task.columns(settings)
    if not isinstance(value, Mapping) or not value.keys() >= set(wanted):
        listed = ", ".join(map(repr, wanted))
        raise DataError(f"{place} is no object with {listed}; give these of each pair")
    return task.question(value, settings, place)


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
