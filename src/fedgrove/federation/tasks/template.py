"""A prompt made of several columns: a text in which columns stand in braces."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from fedgrove.federation.readers import Place, whole
from fedgrove.ground.errors import DataError


def columns_in(template: str) -> list[str]:
    """The columns of a template, each once. Raises ValueError, for pydantic, where it has none, or
    braces that do not close.
    """
    try:
        found = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"its braces do not fit ({error}); write {{{{ for a brace itself."
        ) from None
    if not found or not all(found):
        raise ValueError('it names no column; write one in braces, such as "{instruction}".')
    return list(dict.fromkeys(found))


def filled(
    template: str,
    values: Mapping[str, Any],
    place: Place,
) -> str:
    """The template with a row's columns, without the paragraphs whose columns are all empty.

    Raises DataError for a column that is no text, and where nothing is left.
    """
    paragraphs = [_paragraph(part, values, place) for part in template.split("\n\n")]
    text = "\n\n".join(part for part in paragraphs if part is not None)
    if not text.strip():
        raise DataError(f"{place}: all columns of data.template are empty; remove the row")
    return text


def _paragraph(
    part: str,
    values: Mapping[str, Any],
    place: Place,
) -> str | None:
    """None where it has columns and all are empty."""
    text, filled_in, empty = "", 0, 0
    for literal, name, _, _ in Formatter().parse(part):
        text += literal
        if name is None:
            continue
        value = _text(values[name], name, place)
        text += value
        filled_in += bool(value.strip())
        empty += not value.strip()
    return None if empty and not filled_in else text


def _text(
    value: Any,
    column: str,
    place: Place,
) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise DataError(f"{place}: the column {column!r} is a {type(value).__name__}, not a text")
    return whole(str(value), column, place)
