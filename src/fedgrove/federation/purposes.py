"""What rows are for, where the data say so: files and folders of these names, or a column of these
words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedgrove.federation.readers import PURPOSE, Found, Place, Row, Values, label_of
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


def refuse_pairs(paths: Sequence[Path]) -> None:
    """Raises DataError where two files of a folder of clients read like one client's rows for
    training and for the test: ``north_train.csv`` and ``north_test.csv``.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in paths:
        name = path.name if path.is_dir() else path.stem
        parts = re.fullmatch(r"(.+)[ _.-]+([a-z]+)", name, re.IGNORECASE)
        purpose = parts and WORDS.get(parts[2].lower())
        if parts and purpose:
            found[parts[1], purpose] = path
    for (client, purpose), path in found.items():
        other = found.get((client, TEST))
        if purpose == TRAIN and other is not None:
            raise DataError(
                f"{path.name} and {other.name} in {path.parent} read like the training and test "
                f"rows of one client; put them into a folder {client} as train{path.suffix} and "
                f"test{other.suffix}, or rename them where they are two clients"
            )


def repeated(holdings: Iterable[tuple[str, list[Row], list[str] | None]]) -> list[str]:
    """A sentence where rows that the data give for the test are among those for training, which
    makes every measure better than it is.
    """
    said = []
    for name, rows, purposes in holdings:
        pairs = list(zip(map(repr, rows), purposes or (), strict=False))
        learnt = {row for row, purpose in pairs if purpose == TRAIN}
        tests = [row for row, purpose in pairs if purpose == TEST]
        known = sum(row in learnt for row in tests)
        if known:
            said.append(f"{known} of {len(tests)} of {name}")
    if not said:
        return []
    if len(said) > 3:
        said = [*said[:3], f"and of {len(said) - 3} more"]
    return [f"Test rows that are among the training rows too, word for word: {', '.join(said)}."]


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
