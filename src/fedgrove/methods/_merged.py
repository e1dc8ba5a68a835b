"""What FLoRA and FedEx-LoRA share: a low-rank update that all clients merge into their frozen base
each round.

The server holds the whole update. A client that trained in the last round holds it as it was before
that round, so it is sent what the round added; any other is sent the whole. Both ends merge with
the same function, so they hold the same bits, whichever way a client got there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.lowrank import lean
from fedgrove.adapters.tree import numbers
from fedgrove.ground.errors import RunError
from fedgrove.methods.contract import ClientInfo, Trained


@dataclass(frozen=True, eq=False)
class Merged:
    """At the server: all that was merged so far; before the first round, nothing."""

    delta: Adapter = field(default_factory=dict)
    increment: Adapter = field(default_factory=dict)  # what the last round added to it
    trained: list[str] = field(default_factory=list)  # who trained in the last round


@dataclass(frozen=True, eq=False)
class Brought:
    """What goes down: the whole update, or only what the last round added. The other is None."""

    delta: Adapter | None = None
    increment: Adapter | None = None


@dataclass(frozen=True, eq=False)
class Held:
    """At the client: the update as it last merged it; None before it has trained."""

    delta: Adapter | None = None


def advance(
    state: Merged,
    increment: Adapter,
    trained: Sequence[str],
) -> Merged:
    """The state after a round that adds ``increment``, in which ``trained`` took part."""
    increment = lean(increment)
    return Merged(merge(state.delta, increment), increment, list(trained))


def brought(state: Merged, client: ClientInfo) -> Brought:
    """What goes down: the last round's increment to who can build on it, and where that is less;
    else the whole.
    """
    smaller = numbers(state.increment) < numbers(state.delta)
    if client.name in state.trained and smaller:
        return Brought(increment=state.increment)
    return Brought(delta=state.delta)


OWN_MERGED = "each client goes on from a merged update that it holds itself"


def held(offer: Brought, mine: Held) -> Adapter | None:
    """At the client: the whole merged update that the offer brings it to; None where it is empty.

    RunError where the client no longer holds what the offer builds on.
    """
    if offer.delta is not None:
        return offer.delta or None
    if mine.delta is None or offer.increment is None:
        raise RunError(
            "The server sent what the last round added, but this client's store of the rounds "
            "before it is gone; restore the store, or start the run again."
        )
    return merge(mine.delta, offer.increment) or None


def stays(trained: Trained) -> Held:
    """What the client keeps of a round: the update that its base had while it trained."""
    return Held(trained.assembly.base_delta or {})


def merge(delta: Adapter, increment: Adapter) -> Adapter:
    """Both updates as one. Exact; beyond rank ``min(out, in)`` it is compacted, exact but for
    rounding.

    The scales of the two are equal at each site.
    """
    if not delta:
        return increment
    both: Adapter = {}
    for site, old in delta.items():
        A = torch.cat([old.A, increment[site].A])
        B = torch.cat([old.B, increment[site].B], 1)
        both[site] = Factors(A, B, old.scale)
    return lean(both)
