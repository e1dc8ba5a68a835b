"""Answers that stand in a text: checked, and compared as SQuAD compares them.

Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", arXiv
1606.05250, section 6.1. An answer is ``[start, end]`` in characters, end excluded.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedgrove.federation.readers import Place
from fedgrove.federation.spans import trimmed
from fedgrove.ground.errors import DataError

Answer = list[int]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT = str.maketrans("", "", string.punctuation)
_FORMS = (
    "give a text that stands in it, objects with text and start, or SQuAD's { text, answer_start }"
)


def checked_answers(
    value: object,
    text: str,
    column: str,
    place: Place,
) -> list[Answer]:
    """A row's answers, each right, in the given order; [] where there is none. White space at their
    ends is left out.

    Read are a text, a list of texts or of objects (``text`` with ``start`` or ``answer_start``,
    ``start`` with ``end``), SQuAD's ``{"text": [...], "answer_start": [...]}``, and the JSON of these.
    Raises DataError for what does not stand in the text.
    """
    answers: list[Answer] = []
    for each in _listed(value, column, place):
        answer = _answer(each, text, column, place)
        if answer not in answers:
            answers.append(answer)
    return answers


def normalised(answer: str) -> str:
    """In lower case, without punctuation, articles and more white space than one between words."""
    plain = answer.lower().translate(_WITHOUT)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def overlap(answer: str, right: Sequence[str]) -> dict[str, float]:
    """``exact_match`` and ``answer_f1`` with the right answer that is best for each; where none is
    right, the empty answer is.
    """
    due = list(right) or [""]
    return {
        "exact_match": max(float(normalised(answer) == normalised(each)) for each in due),
        "answer_f1": max(_f1(answer, each) for each in due),
    }


def _f1(answer: str, right: str) -> float:
    """Of the words that the two have in common; of no words whether both have none."""
    mine = normalised(answer).split()
    due = normalised(right).split()
    if not mine or not due:
        return float(mine == due)
    common = sum((Counter(mine) & Counter(due)).values())
    return 2 * common / (len(mine) + len(due))


def _listed(
    value: object,
    column: str,
    place: Place,
) -> list[object]:
    """Each answer, in one of the forms."""
    value = _parsed(value)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping) and not isinstance(value.get("text"), str) and "text" in value:
        return _paired(value, column, place)
    if isinstance(value, Mapping):
        return [value]
    if _is_list(value):
        found: list[Any] = list(value)  # type: ignore[call-overload]
        return found
    raise DataError(f"{place}: the column {column!r} has {value!r}, which is no answer; {_FORMS}")


def _paired(
    value: Mapping[str, Any],
    column: str,
    place: Place,
) -> list[object]:
    """SQuAD's two lists side by side."""
    texts = value.get("text")
    starts = value.get("answer_start")
    if not _is_list(texts) or not _is_list(starts) or len(texts) != len(starts):  # type: ignore[arg-type]
        raise DataError(
            f"{place}: the column {column!r} has lists text and answer_start that do not fit; give "
            "one start for each text"
        )
    pairs = zip(list(texts), list(starts), strict=True)  # type: ignore[arg-type]
    return [{"text": text, "start": start} for text, start in pairs]


def _answer(
    value: object,
    text: str,
    column: str,
    place: Place,
) -> Answer:
    if isinstance(value, str):
        first = _only_place(value, text, column, place)
        return _trimmed(first, first + len(value), text, place)
    if not isinstance(value, Mapping):
        raise DataError(
            f"{place}: the column {column!r} has {value!r}, which is no answer; {_FORMS}"
        )
    said = value.get("text")
    if said is not None and not isinstance(said, str):
        raise DataError(f"{place}: an answer's text is {said!r}, not a text; correct it")
    given = value.get("start", value.get("answer_start"))
    if given is None and said is not None:
        return _answer(said, text, column, place)
    start = _place_in_text(given, "start", place)
    if "end" in value or said is None:
        end = _place_in_text(value.get("end"), "end", place)
    else:
        end = start + len(said)
    if not 0 <= start <= end <= len(text):
        raise DataError(
            f"{place}: the answer {start} to {end} is not in the text, which has {len(text)} "
            "characters; correct or remove it"
        )
    if said is not None and text[start:end] != said:
        raise DataError(
            f"{place}: at {start} the text has {text[start:end]!r}, not the answer {said!r}; correct "
            "its start"
        )
    return _trimmed(start, end, text, place)


def _only_place(
    answer: str,
    text: str,
    column: str,
    place: Place,
) -> int:
    """Where an answer stands that says nothing of it."""
    if not answer.strip():
        raise DataError(f"{place}: an answer is empty; remove it")
    count = text.count(answer)
    if count == 1:
        return text.index(answer)
    if not count:
        raise DataError(
            f"{place}: the answer {answer!r} (column {column!r}) does not stand in the text; "
            "correct or remove the row"
        )
    raise DataError(
        f"{place}: the answer {answer!r} stands {count} times in the text; say which one is meant, "
        'as { "text": ..., "start": ... }'
    )


def _trimmed(
    first: int,
    last: int,
    text: str,
    place: Place,
) -> Answer:
    start, end = trimmed(first, last, text)
    if start >= end:
        raise DataError(f"{place}: the answer {first} to {last} is empty; remove it")
    return [start, end]


def _place_in_text(
    value: object,
    what: str,
    place: Place,
) -> int:
    """A whole number of characters; of a table also as 3.0, for its empty cells make it numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int_of(value):
        raise DataError(
            f"{place}: an answer's {what} is {value!r}, not a place in the text; give characters "
            "from its beginning"
        )
    return int(value)


def int_of(value: float) -> int | None:
    """The whole part of a number; None where it has none (NaN, infinite)."""
    try:
        return int(value)
    except (ValueError, OverflowError):
        return None


def _parsed(value: object) -> object:
    """A list or an object that a text is the JSON of; NaN, a table's empty cell, is none."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _is_list(value: object) -> bool:
    """Also an array of a table."""
    return hasattr(value, "__len__") and not isinstance(value, str | bytes | Mapping)
