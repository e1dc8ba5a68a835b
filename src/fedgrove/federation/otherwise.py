"""Rows that are of another task than the job's: what they look like, and who learns them."""

from __future__ import annotations

import ast
from collections.abc import Collection

from fedgrove.ground.errors import DataError

#: what rows may be, in words; a task that learns such rows says so in ``Task.suits``
SEVERAL = "several labels for one row"
NUMBERS = "a number to predict for each row"
TOKENS = "a tag for each word of a row"
PREFERENCES = "a preference between two answers"
SPANS = "an answer that stands in a text"

MOST = 20  # different numbers, some of them no whole ones, may be classes


class OtherRows(DataError):
    """Rows of another kind. What to do about it is said by who knows the tasks."""

    def __init__(self, sentence: str, kind: str):
        super().__init__(sentence)
        self.kind = kind


def is_list(value: object) -> bool:
    """Whether a label is a list, or the text of one."""
    if not isinstance(value, str):
        return hasattr(value, "__iter__")
    if value[:1] != "[":
        return False
    try:
        return isinstance(ast.literal_eval(value), list)
    except (ValueError, SyntaxError):
        return False


def are_measures(labels: Collection[str], rows: int) -> bool:
    """Whether the labels of so many rows look like a quantity, and not like classes: many different
    numbers, not all of them whole.
    """
    if len(labels) <= MOST or 2 * len(labels) <= rows:
        return False
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return False
    return not all(number.is_integer() for number in numbers)


def other_columns(present: Collection[str]) -> str:
    """What rows with these columns are, where the columns say so; else ""."""
    if {"chosen", "rejected"} <= set(present):
        return PREFERENCES
    if {"context", "question", "answers"} <= set(present):
        return SPANS
    if {"tokens", "ner_tags"} <= set(present):
        return TOKENS
    return ""
