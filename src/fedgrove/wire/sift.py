"""Which updates can be used: finite ones, that leave no layer out and go with the others'. The
server's half is pure, so it can be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from fedgrove.adapters.tree import leaves, walk
from fedgrove.ground.errors import RunError

if TYPE_CHECKING:
    from fedgrove.adapters.adapter import Sites
    from fedgrove.methods.contract import Update

S = TypeVar("S")  # a method's state
Aggregate = Callable[[Sequence["Update"]], S]
Whys = list[tuple[str, str]]  # (client, why it is left out)


def infinite_at(tree: object) -> str | None:
    """The path of the first tensor of a tree that has an infinite number or one that is none, or
    None.
    """
    for path, tensor in leaves(tree):
        if not tensor.is_floating_point():
            continue
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            return path
    return None


def not_finite(content: object) -> str | None:
    """A clause on the first part of an update that has an infinite number or one that is none, or
    None.
    """
    path = infinite_at(content)
    if path is None:
        return None
    return f"{path} of its update holds numbers that are not finite"


def refuse_loss(
    before: object,
    after: object,
    sites: Sites,
) -> None:
    """Raises ``RunError`` where an adapted layer of the state before is nowhere in the state after.

    Otherwise one update without a layer could take it from everybody: alone it aggregates well.
    """
    gone = _named(before, sites) - _named(after, sites)
    if gone:
        first = min(gone)
        raise RunError(f"the next state would lack the layer {first}")


def _named(tree: object, sites: Sites) -> set[str]:
    """The adapted layers that stand anywhere in a tree."""
    named: set[str] = set()
    for keys, _ in walk(tree):
        for key in keys:
            if key in sites:
                named.add(str(key))
    return named


def sift(
    aggregate: Aggregate[S],
    updates: Sequence[Update],
) -> tuple[S | None, Whys]:
    """(the new state, [(client, why) ...] of those left out); the state is None where nobody's
    update can be used.

    Where ``aggregate`` fails or gives a number that is not finite, those whose update fails alone
    are left out; where each works alone, the one without whom the rest works.
    """
    state, why = _try(aggregate, updates)
    if why is None:
        return state, []
    kept, out = _usable_alone(aggregate, updates)
    while kept:
        state, why = _try(aggregate, kept)
        if why is None:
            return state, out
        suspect = _suspect(aggregate, kept)
        if suspect is None:
            # No single one explains it: nobody is more suspect than the others.
            for update in kept:
                out.append((update.client, why))
            return None, out
        blame = f"it does not go with the others' ({why})"
        out.append((suspect.client, blame))
        kept = _without(kept, suspect)
    return None, out


def _usable_alone(
    aggregate: Aggregate[S],
    updates: Sequence[Update],
) -> tuple[list[Update], Whys]:
    """(those that work alone, [(client, why) ...] of the others)."""
    kept: list[Update] = []
    out: Whys = []
    for update in updates:
        _, why = _try(aggregate, [update])
        if why is None:
            kept.append(update)
        else:
            out.append((update.client, why))
    return kept, out


def _suspect(aggregate: Aggregate[S], kept: Sequence[Update]) -> Update | None:
    """The first without which the rest works."""
    for update in kept:
        rest = _without(kept, update)
        if not rest:
            continue
        _, why = _try(aggregate, rest)
        if why is None:
            return update
    return None


def _without(updates: Sequence[Update], one: Update) -> list[Update]:
    return [update for update in updates if update is not one]


def _try(
    aggregate: Aggregate[S],
    updates: Sequence[Update],
) -> tuple[S | None, str | None]:
    """(the state, None), or (None, why there is none)."""
    try:
        state = aggregate(updates)
    except Exception as error:
        kind = type(error).__name__
        words = " ".join(str(error).split())
        return None, f"the server's half failed on it ({kind}: {words[:200]})"
    path = infinite_at(state)
    if path is not None:
        return None, f"the server's half made {path} infinite or not a number of it"
    return state, None
