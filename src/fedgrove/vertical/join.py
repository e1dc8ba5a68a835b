"""Which rows of the parties are one entity: joined by a keyed hash of an id.

Each party sends HMAC-SHA256 of its ids under a key that the parties share, never the ids. This is
not private set intersection: whoever holds the key can hash ids that it guesses, and everybody learns
how many entities are elsewhere, and which of its own.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedgrove.ground.errors import DataError
from fedgrove.ground.toml import shown


@dataclass(frozen=True)
class Ids:
    """One party's ids in the order of its rows, and where each stands."""

    ids: Sequence[str]
    places: Sequence[str]


@dataclass(frozen=True)
class Joined:
    """The entities that every party has, in the order of their hashes."""

    keys: Sequence[str]
    rows: Mapping[str, Sequence[int]]  # of each party: where each entity's row stands
    left_out: Mapping[str, int]  # of each party: how many of its rows not all others have


def hashed(key: bytes, entity: str) -> str:
    return hmac.new(key, entity.encode(), hashlib.sha256).hexdigest()


def hashes(party: str, own: Ids, key: bytes) -> dict[str, int]:
    """What a party sends, with the row that each stands for. Raises ``DataError`` where an id is
    there twice.
    """
    first: dict[str, int] = {}
    found: dict[str, int] = {}
    for row, entity in enumerate(own.ids):
        if entity in first:
            before = own.places[first[entity]]
            raise DataError(
                f"party {shown(party)}: the id {shown(entity)} stands twice, in {before} and in "
                f"{own.places[row]}; an entity has one row at a party, remove one."
            )
        first[entity] = row
        found[hashed(key, entity)] = row
    return found


def join(parties: Mapping[str, Mapping[str, int]], *, drop: bool) -> Joined:
    """What all parties have. It depends on no party's order of rows.

    Args:
        parties: what each party sent, by its name (``hashes``).
        drop: leave out what not all have, instead of refusing it.
    """
    common = set.intersection(*(set(own) for own in parties.values()))
    left_out = {name: len(own) - len(common) for name, own in parties.items()}
    if not common:
        counts = ", ".join(f"{name} {len(own)}" for name, own in parties.items())
        raise DataError(
            f"No id is at all parties (ids at each: {counts}); data.id must name the same thing in "
            f"every table, written the same way."
        )
    if any(left_out.values()) and not drop:
        raise DataError(_unmatched(parties, left_out))
    keys = sorted(common)
    rows = {name: [own[key] for key in keys] for name, own in parties.items()}
    return Joined(keys, rows, left_out)


def _unmatched(
    parties: Mapping[str, Mapping[str, int]],
    left_out: Mapping[str, int],
) -> str:
    told = [
        f"{count} of the {len(parties[name])} ids of {shown(name)}"
        for name, count in left_out.items()
        if count
    ]
    return (
        f"{' and '.join(told)} are missing at another party; complete the tables, or leave such "
        f'entities out with data.unmatched = "drop".'
    )


def by_row(parties: Mapping[str, int], key: bytes) -> dict[str, dict[str, int]]:
    """The same of tables without an id, whose rows are the same entities in one order; by the number
    of each party's rows. Raises ``DataError`` where these differ.
    """
    if len(set(parties.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in parties.items())
        raise DataError(
            f"The parties have unequal numbers of rows ({counts}), so row numbers cannot be ids: from "
            f"the first missing row on they would mean other entities; set data.id to a column."
        )
    return {
        name: {hashed(key, f"row {row}"): row for row in range(count)}
        for name, count in parties.items()
    }
