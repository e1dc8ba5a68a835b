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
    return {
        label: meaning if len(same) > 1 else label
        for meaning, same in members.items()
        for label in same
    }


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
    return fitting[0] if len(fitting) == 1 else None


def _means_numbers(labels: Collection[str]) -> bool:
    """Whether true and false stand for 1 and 0."""
    meanings = {_meaning(label, False) for label in labels}
    return meanings <= {"0", "1", *_TRUTH} and bool(meanings & {"0", "1"})


def _meaning(label: str, truths: bool) -> str:
    if _WHOLE.fullmatch(label):
        number = label.lstrip("+").partition(".")[0]
        return "0" if number == "-0" else number
    word = label.lower()
    if word in _TRUTH:
        return _TRUTH[word] if truths else word
    return label
