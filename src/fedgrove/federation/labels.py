"""Which spellings are one label: files of different tools write 1, 1.0, "1 ", true and True."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)(\.0*)?")  # "01" and "1.50" may be codes: they stay
_TRUTH = {"true": "1", "false": "0"}


def classes_of(labels: Iterable[str]) -> dict[str, str]:
    """``{spelling: class}`` of all labels of a data set.

    Whole numbers are one class however they are written, and so are the words true and false in
    any case; where there are no other labels than 0, 1, true and false, true is 1. A class with one
    spelling is called by it; one with several by the plain number or word. Everything else is a
    class of its own.
    """
    spelt = set(labels)
    truths = _means_numbers(spelt)
    members: dict[str, list[str]] = {}
    for label in sorted(spelt):
        members.setdefault(_meaning(label, truths), []).append(label)
    found: dict[str, str] = {}
    for meaning, same in members.items():
        if len(same) > 1:
            found |= dict.fromkeys(same, meaning)
        else:
            found[same[0]] = same[0]
    return found


def merged(classes: dict[str, str]) -> dict[str, list[str]]:
    """Of ``classes_of``, the classes that have several spellings, each with them."""
    found: dict[str, list[str]] = {}
    for label, name in classes.items():
        found.setdefault(name, []).append(label)
    return {name: spellings for name, spellings in found.items() if len(spellings) > 1}


def class_among(label: str, known: Collection[str]) -> str | None:
    """The one of the ``known`` classes that a label spells, or None."""
    if label in known:
        return label
    truths = _means_numbers({label, *known})
    meaning = _meaning(label, truths)
    fitting = [each for each in known if _meaning(each, truths) == meaning]
    if len(fitting) != 1:
        return None
    return fitting[0]


def _means_numbers(labels: Collection[str]) -> bool:
    """Whether true and false stand for 1 and 0."""
    meanings = {_meaning(label, False) for label in labels}
    numbers = {"0", "1"}
    if not meanings <= {*numbers, *_TRUTH}:
        return False
    return bool(meanings & numbers)


def _meaning(label: str, truths: bool) -> str:
    if _WHOLE.fullmatch(label):
        number = label.lstrip("+").partition(".")[0]
        if number == "-0":
            return "0"
        return number
    word = label.lower()
    if word not in _TRUTH:
        return label
    if truths:
        return _TRUTH[word]
    return word
