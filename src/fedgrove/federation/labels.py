"""Which spellings are one label: files of different tools write 1, 1.0, "1 ", true and True."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterable

#: "01" and "1.50" may be codes: they stay. "1,0" is what a German spreadsheet makes of 1.
_WHOLE = re.compile(r"([+-]?)(0|[1-9][0-9]*)(\.0*|,00?)?")
#: as numpy writes numbers into text: 1.000e+00
_SCIENTIFIC = re.compile(r"[+-]?[0-9](\.[0-9]+)?e[+-][0-9]{2}", re.IGNORECASE)
_TRUTH = {"true": "1", "false": "0"}


def classes_of(labels: Iterable[str]) -> dict[str, str]:
    """``{spelling: class}`` of all labels of a data set.

    Whole numbers are one class however they are written, and so are the words true and false in
    any case, and letters with accents however they are encoded (NFC, NFD); where there are no other
    labels than 0, 1, true and false, true is 1. A class with one spelling is called by it; one with
    several by the plain number or word. Everything else is a class of its own.
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


#: what libraries write for a value that is missing, where it becomes a text
_MISSING = {"nan", "<na>", "nat"}


def doubtful(classes: Collection[str]) -> list[str]:
    """A sentence for each thing in the names of the classes that is likelier a slip than meant."""
    said = []
    for same in _alike(classes):
        listed = ", ".join(map(repr, same))
        said.append(
            f"The labels {listed} look alike and stay {len(same)} classes; where they mean one, "
            "spell them alike."
        )
    if len(said) > 3:
        said = [*said[:3], f"So do {len(said) - 3} more groups of labels."]
    for name in sorted(classes):
        if name.lower() in _MISSING:
            said.append(
                f"The label {name!r} is a class like any other; where it means that there is none, "
                "remove those rows."
            )
    return said


def _alike(classes: Collection[str]) -> list[list[str]]:
    """Those that are one number, or one word but for quotation marks and letters of other forms."""
    groups: dict[str, list[str]] = {}
    for name in sorted(classes):
        groups.setdefault(_loosely(name), []).append(name)
    return [same for same in groups.values() if len(same) > 1]


def _loosely(label: str) -> str:
    bare = unicodedata.normalize("NFKC", label).strip("'\"` ").casefold()
    try:
        number = float(bare.replace(",", "."))
    except ValueError:
        return bare
    if math.isfinite(number) and abs(number) < 2**53:
        return repr(number + 0.0)
    return bare


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
    if whole := _WHOLE.fullmatch(label):
        number = whole[1].strip("+") + whole[2]
        if number == "-0":
            return "0"
        return number
    if _SCIENTIFIC.fullmatch(label):
        value = float(label)
        if value.is_integer() and abs(value) < 2**53:
            return str(int(value))
    label = unicodedata.normalize("NFC", label)
    word = label.lower()
    if word not in _TRUTH:
        return label
    if truths:
        return _TRUTH[word]
    return word
