"""Which plain figures may come over the wire: how a client describes itself, what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

from fedgrove.ground.names import client_name
from fedgrove.wire.validate import LONGEST_TEXT

MOST = 10**12  # of any count that a client tells
MOST_MEASURES = 20
LONGEST_NAME = 40  # of a measure
_KEYS_OF_A_LINE = ("round", "client", "split")  # of ``metrics.jsonl``, which measures go into


def row_fault(
    row: object,
    rank: object,
    labels: Sequence[str],
    *,
    strict: bool = True,
) -> str | None:
    """A clause on what is wrong with how a client describes itself, or None.

    Its number of examples becomes a weight, its name a key, and all of it a line of
    ``federation.json``. ``strict``: nothing but what a site may tell.
    """
    if not isinstance(row, Mapping):
        return "it does not say who it is"
    name = row.get("name")
    if not isinstance(name, str):
        return "it does not say who it is"
    if client_name(name) != name:
        return "its name is none for a client"
    train = row.get("train")
    if not _positive(train):
        return f"it says that it has {_short(train)} examples to train on"
    if rank is not None and not _positive(rank):
        return f"it affords the rank {_short(rank)}"
    if not strict:
        return None
    counts = row.get("labels", {})
    if not _counts_of(counts, labels):
        return "its labels are not those of the job with a number for each"
    for key, value in row.items():
        if key in ("name", "labels"):
            continue
        if not _describes(key, value):
            return f"{key[:LONGEST_TEXT]!r} of its description is none"
    return None


def _short(value: object) -> str:
    words = str(value)
    return words[:20]


def measures_fault(
    found: object,
    *,
    needed: set[str],
    known: set[str] | None = None,
) -> str | None:
    """A clause on what is wrong with a client's measures, or None. ``needed``: must be there;
    ``known``: may be there.

    None, and NaN for what could not be measured, pass in place of a number where ``known`` says
    which keys there are.
    """
    if not isinstance(found, Mapping):
        found = {}
    missing = needed - set(found)
    if missing:
        words = ", ".join(sorted(missing))
        return f"they have no {words}"
    for key, value in found.items():
        if not _names_a_measure(key, known):
            return f"{key[:LONGEST_TEXT]!r} is no measure"
        absent = value is None and known is not None
        if not absent and not _number(value):
            return f"{key} is no number"
    if len(found) > MOST_MEASURES:
        return f"they are {len(found)}"
    return None


def figures_fault(**figures: object) -> str | None:
    """A clause on the first figure that is no number from 0 to ``MOST``, or None."""
    for name, value in figures.items():
        if not _number(value):
            return f"{name} is no usable number"
        if not 0 <= value <= MOST:
            return f"{name} is no usable number"
    return None


def _names_a_measure(key: str, known: set[str] | None) -> bool:
    if known is not None:
        return key in known
    if key in _KEYS_OF_A_LINE:
        return False
    if len(key) > LONGEST_NAME:
        return False
    return key.isidentifier()


def _counts_of(counts: object, labels: Sequence[str]) -> bool:
    if not isinstance(counts, Mapping):
        return False
    if not set(counts) <= set(labels):
        return False
    return all(map(_count, counts.values()))


def _describes(key: str, value: object) -> bool:
    """Whether a site may say this of itself."""
    if key in ("train", "test", "validation"):
        return _count(value)
    if key in ("group", "held_out"):
        if isinstance(value, str):
            return len(value) <= LONGEST_TEXT
        return value is None or isinstance(value, bool)
    if len(key) > LONGEST_TEXT:
        return False
    return _number(value)


def _count(value: object) -> TypeGuard[int]:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) and 0 <= value <= MOST


def _positive(value: object) -> bool:
    return _count(value) and value > 0


def _number(value: object) -> TypeGuard[float]:
    """A number that can be written down: no truth value, and no integer that is too large for a
    float.
    """
    if isinstance(value, bool):
        return False
    if isinstance(value, float):
        return True
    return isinstance(value, int) and abs(value) <= MOST
