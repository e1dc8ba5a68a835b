"""Entities in texts: spans of characters or tags of words, checked, and one as the other.

A span is ``[start, end, type]`` in characters, end excluded. Tags are B-I-O: ``O``, ``B-TYPE``,
``I-TYPE``; other schemes (IOB1, BIOES, BILOU, the type alone) are read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fedgrove.federation.readers import Place, label_of, whole
from fedgrove.ground.errors import DataError

Span = list[Any]  # [start, end, type]
Word = list[int]  # [start, end]
OUTSIDE = "O"

#: runs of digits, runs of letters, single signs; signs of scripts without spaces one by one
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\d+|[^\W\d\u3040-\u9fff]+|[^\w\s]")
_PREFIXED = re.compile(r"[BIESLU]-.+")
_SAME = {"L": "E", "U": "S"}  # BILOU's letters as BIOES has them


def words_of(text: str) -> list[Word]:
    """Where the words of a text stand."""
    return [[found.start(), found.end()] for found in _WORD.finditer(text)]


def joined(words: Sequence[str]) -> tuple[str, list[Word]]:
    """A text of these words, and where each stands in it."""
    places: list[Word] = []
    start = 0
    for word in words:
        places.append([start, start + len(word)])
        start += len(word) + 1
    return " ".join(words), places


def word_list(
    value: object,
    column: str,
    place: Place,
) -> list[str]:
    """A row's words: a list, the JSON of one, or a text with spaces between. Raises DataError."""
    found = _listed(value)
    if found is None and isinstance(value, str):
        found = [*value.split()]
    if not found:
        raise DataError(f"{place}: the column {column!r} has no words; correct or remove the row")
    for number, word in enumerate(found, start=1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(
                f"{place}: word {number} of the column {column!r} is {word!r}, not a text; correct "
                "or remove the row"
            )
        whole(word, column, place)
    return [str(word) for word in found]


def tag_list(
    value: object,
    words: int,
    names: Sequence[str] | None,
    column: str,
    place: Place,
) -> list[str]:
    """A row's tags as BIOES, one for each of its words; numbers by their ``names``. Raises
    DataError.
    """
    found = _listed(value)
    if found is None and isinstance(value, str):
        found = [*value.split()]
    if found is None or len(found) != words:
        count = len(found or [])
        raise DataError(
            f"{place} has {words} words, but the column {column!r} has {count} tags; give one for "
            "each word"
        )
    return [_tag(each, names, column, place) for each in found]


def _tag(
    value: object,
    names: Sequence[str] | None,
    column: str,
    place: Place,
) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if not names or not 0 <= value < len(names):
            raise DataError(
                f"{place}: the column {column!r} has the number {value} for a tag; name what the "
                "numbers mean, in their order, in data.tag_names"
            )
        value = names[value]
    tag = label_of(value, column, place)
    if tag == OUTSIDE:
        return tag
    if tag in ("B", "I", "E", "S", "L", "U") or tag[1:] == "-":
        raise DataError(f"{place}: the tag {tag!r} has no type; write {tag[0]}-TYPE")
    if not _PREFIXED.fullmatch(tag):
        return f"I-{tag}"
    return _SAME.get(tag[0], tag[0]) + tag[1:]


def spans_of_tags(tags: Sequence[str], words: Sequence[Word]) -> list[Span]:
    """The entities of tagged words."""
    from seqeval.metrics.sequence_labeling import get_entities

    found: list[Span] = []
    for kind, first, last in get_entities(list(tags)):
        start = words[first][0]
        end = words[last][1]
        found.append([start, end, str(kind)])
    return found


def tags_of_spans(spans: Sequence[Span], words: Sequence[Word]) -> list[str]:
    """B-I-O of each word."""
    tags = [OUTSIDE] * len(words)
    for start, end, kind in spans:
        inside = [number for number, word in enumerate(words) if start <= word[0] < end]
        for number in inside:
            tags[number] = f"I-{kind}"
        tags[inside[0]] = f"B-{kind}"
    return tags


def checked_spans(
    value: object,
    text: str,
    words: Sequence[Word],
    column: str,
    place: Place,
) -> list[Span]:
    """A row's spans in their order: objects with start, end and label, or lists of the three, or
    the JSON of that. White space at their ends is left out.

    Raises DataError for spans that are empty, leave the text, overlap, or end inside a word.
    """
    found = _listed(value)
    if found is None and value == "":
        found = []
    if found is None:
        raise DataError(
            f"{place}: the column {column!r} is no list of spans; give objects with start, end and "
            "label, [] where there is none"
        )
    spans = sorted(_span(each, text, column, place) for each in found)
    for before, after in pairwise(spans):
        if after[0] < before[1]:
            raise DataError(
                f"{place}: the spans {_shown(before, text)} and {_shown(after, text)} overlap; "
                "keep one of them"
            )
    starts = {start for start, _ in words}
    ends = {end for _, end in words}
    for span in spans:
        if span[0] not in starts:
            where = "begins"
        elif span[1] not in ends:
            where = "ends"
        else:
            continue
        raise DataError(
            f"{place}: the span {_shown(span, text)} {where} inside a word; move it to the "
            "word's edge"
        )
    return spans


def _span(
    value: object,
    text: str,
    column: str,
    place: Place,
) -> Span:
    found = _three(value)
    if found is None:
        raise DataError(
            f"{place}: the column {column!r} has {value!r}, which is no span; give start and end in "
            "characters, and label"
        )
    first, last, label = found
    if not 0 <= first <= last <= len(text):
        raise DataError(
            f"{place}: the span {first} to {last} is not in the text, which has {len(text)} "
            "characters; correct or remove it"
        )
    start, end = trimmed(first, last, text)
    if start >= end:
        raise DataError(f"{place}: the span {first} to {last} is empty; remove it")
    return [start, end, label_of(label, column, place)]


def trimmed(first: int, last: int, text: str) -> tuple[int, int]:
    """A part of a text without the white space at its ends; of nothing else, no part."""
    own = text[first:last]
    start = first + len(own) - len(own.lstrip())
    return start, last - len(own) + len(own.rstrip())


def _three(value: object) -> tuple[int, int, object] | None:
    """Start, end and label, where the value has them."""
    parts = value
    if isinstance(value, dict):
        parts = [value.get(key) for key in ("start", "end", "label")]
    if not isinstance(parts, list | tuple) or len(parts) != 3:
        return None
    start, end, label = parts
    if not _is_place(start) or not _is_place(end):
        return None
    return int(start), int(end), label


def _is_place(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(span: Span, text: str) -> str:
    start, end, _ = span
    return f"{start} to {end} ({text[start:end]!r})"


def _listed(value: object) -> list[object] | None:
    """A list, or the list that a text is the JSON of; else None."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, list | tuple):
        return list(value)
    return None
