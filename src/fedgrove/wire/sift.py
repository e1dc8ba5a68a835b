"""Which updates can be used: finite ones, that leave no layer out and go with the others'. The
server's half is pure, so it can be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from fedgrove.adapters.tree import leaves, walk
from fedgrove.ground.errors import RunError

if TYPE_CHECKING:
    from fedgrove.adapters.adapter import Site
    from fedgrove.methods.contract import Update

S = TypeVar("S")  # a method's state
Aggregate = Callable[[Sequence["Update"]], S]


def infinite_at(tree: object) -> str | None:
    """The path of the first tensor of a tree that has an infinite number or one that is none, or
    None.
    """
    for path, tensor in leaves(tree):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
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


def refuse_loss(before: object, after: object, sites: Mapping[str, Site]) -> None:
    """Raises ``RunError`` where an adapted layer of the state before is nowhere in the state after.

    Otherwise one update without a layer could take it from everybody: alone it aggregates well.
    """
    gone = sorted(_named(before, sites) - _named(after, sites))
    if gone:
        raise RunError(f"the next state would lack the layer {gone[0]}")


def _named(tree: object, sites: Mapping[str, Site]) -> set[str]:
    """The adapted layers that stand anywhere in a tree."""
    return {str(key) for keys, _ in walk(tree) for key in keys if key in sites}


def sift(
    aggregate: Aggregate[S], updates: Sequence[Update]
) -> tuple[S | None, list[tuple[str, str]]]:
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
            return None, [*out, *((update.client, why) for update in kept)]
        out.append((suspect.client, f"it does not go with the others' ({why})"))
        kept = _without(kept, suspect)
    return None, out


def _usable_alone(
    aggregate: Aggregate[S], updates: Sequence[Update]
) -> tuple[list[Update], list[tuple[str, str]]]:
    """(those that work alone, [(client, why) ...] of the others)."""
    kept, out = [], []
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
        if rest and _try(aggregate, rest)[1] is None:
            return update
    return None


def _without(updates: Sequence[Update], one: Update) -> list[Update]:
    return [update for update in updates if update is not one]


def _try(aggregate: Aggregate[S], updates: Sequence[Update]) -> tuple[S | None, str | None]:
    """(the state, None), or (None, why there is none)."""
    try:
        state = aggregate(updates)
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        return None, f"the server's half failed on it ({type(error).__name__}: {words})"
    if (path := infinite_at(state)) is not None:
        return None, f"the server's half made {path} infinite or not a number of it"
    return state, None
