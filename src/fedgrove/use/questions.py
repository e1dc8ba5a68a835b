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
    """A row for each text, image or prompt, or for each object that has the task's ``beside`` too.
    Raises ``DataError`` for what cannot be asked, with its number.
    """
    what = task.asks
    single = isinstance(given, str | bytes | Path | Mapping) or hasattr(
        given, "mode"
    )  # "mode": a PIL image
    objects = not single and any(isinstance(each, Mapping) for each in given)
    if single or (objects and what == "prompt" and not task.beside):
        raise DataError(
            f"what a model is asked is a list, of one {what} or more; put the one {what} into a "
            f"list"
        )
    whole = bool(task.beside) and (objects or not task.writes)
    rows: list[Row] = []
    for number, value in enumerate(given, start=1):
        place = f"{what} {number}"
        if whole:
            rows.append(_whole(task, value, place))
        else:
            rows.append({what: _question(value, what, place)})
    if not rows:
        raise DataError(f"the list is empty; ask about one {what} or more")
    return rows


def with_beside(
    task: type[Task],
    texts: Sequence[str],
    beside: Mapping[str, str],
) -> Sequence[Any]:
    """The texts of a command, each with what its options put beside it: parts of a row by their names.
    Raises ``DataError`` where the task has no such parts.
    """
    if not beside:
        return texts
    if beside.keys() != set(task.beside):
        raise DataError(
            f"data.task = {task.name!r} is not asked with {_listed(tuple(beside))}: --context is for "
            "spans, --between for prefer and reward"
        )
    return [{task.asks: text, **beside} for text in texts]


def answered(task: Task, rows: Sequence[Given]) -> list[Row]:
    """Rows to measure on. Raises ``DataError`` where there are none, or where one lacks its
    question or answer.
    """
    parts = tuple(dict.fromkeys((task.asks, *task.beside, task.learns)))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is no object; give rows with {_listed(parts)}")
        missing = [key for key in parts if key not in row]
        if missing and not {"messages", "plain"} & row.keys():
            raise DataError(f"row {number} has no {missing[0]!r}; give rows with {_listed(parts)}")
    if not rows:
        raise DataError("there are no rows to measure on; give one or more")
    return [dict(row) for row in rows]


def _whole(
    task: Task,
    value: Any,
    place: str,
) -> Row:
    """What is asked, checked together with what stands beside it."""
    parts = (task.asks, *task.beside)
    if not isinstance(value, Mapping) or not value.keys() >= set(parts):
        raise DataError(f"{place} is no object with {_listed(parts)}; give these of each")
    return task.question(value, task.Options(), place)


def _listed(parts: Sequence[str]) -> str:
    """ "'text' and 'label'" """
    *first, last = map(repr, parts)
    if not first:
        return last
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
