"""What rows are for, where the data say so: files and folders of these names, or a column of these
words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedgrove.federation.readers import PURPOSE, Found, Place, Values, label_of
from fedgrove.ground.errors import DataError

TRAIN, TEST, VALIDATION = "train", "test", "validation"

#: the words for each, in any case
WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "test": TEST,
    "testing": TEST,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "eval": VALIDATION,
    "evaluation": VALIDATION,
}


def purposes_of(paths: Sequence[Path]) -> dict[str, Path]:
    """``{"train": path, "test": path}`` where files or folders are named for that and nothing else
    lies beside them; else {}. Raises DataError where two are for the same.
    """
    found: dict[str, Path] = {}
    for path in paths:
        purpose = WORDS.get((path.name if path.is_dir() else path.stem).lower())
        if purpose is None:
            return {}
        if purpose in found:
            raise DataError(
                f"{found[purpose]} and {path} are both for {purpose}; merge or remove one of them"
            )
        found[purpose] = path
    return found if {TRAIN, TEST} <= set(found) else {}


def marked(found: Found, purpose: str) -> Iterator[tuple[Place, Values]]:
    """Rows with what they are for."""
    for place, values in found:
        yield place, {**values, PURPOSE: purpose}


def purpose_of(
    values: Values,
    column: str | None,
    place: Place,
) -> str | None:
    """What a row is for, by its source or by a column of the job's; None where neither says so.

    Raises DataError for a word that is none of ``WORDS``.
    """
    if PURPOSE in values:
        return str(values[PURPOSE])
    if column is None:
        return None
    word = label_of(values[column], column, place)
    purpose = WORDS.get(word.lower())
    if purpose is None:
        raise DataError(
            f"{place}: the column {column!r} is {word!r}; it must be one of {', '.join(WORDS)}"
        )
    return purpose
