"""What FLoRA and FedEx-LoRA share: a low-rank update that all clients merge into their frozen base
each round.

The server holds the whole update. A client that trained in the last round holds it as it was before
that round, so it is sent what the round added; any other is sent the whole. Both ends merge with
the same function, so they hold the same bits, whichever way a client got there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.lowrank import lean
from fedgrove.adapters.tree import numbers
from fedgrove.ground.errors import RunError
from fedgrove.methods.contract import ClientInfo, Mine, Offer, State


def nothing_merged() -> State:
    """The part of the server's state before the first round."""
    return {"delta": {}, "increment": {}, "trained": []}


def advance(state: Mapping[str, Any], increment: Adapter, trained: Sequence[str]) -> State:
    """The part of the server's state after a round that adds ``increment``, in which ``trained``
    took part.
    """
    increment = lean(increment)
    return {
        "delta": merge(state["delta"], increment),
        "increment": increment,
        "trained": list(trained),
    }


def merged_part(state: Mapping[str, Any], client: ClientInfo) -> Offer:
    """What goes down: the last round's increment to who can build on it, and where that is less;
    else the whole.
    """
    if client.name in state["trained"] and numbers(state["increment"]) < numbers(state["delta"]):
        return {"increment": state["increment"]}
    return {"delta": state["delta"]}


def held(offer: Offer, mine: Mine) -> Adapter:
    """At the client: the whole merged update that the offer brings it to; ``mine["delta"]`` is its
    last one.
    """
    if "delta" in offer:
        delta: Adapter = offer["delta"]
        return delta
    if "delta" not in mine:
        raise RunError(
            "The server sent what the last round added, but this client's store of the rounds "
            "before it is gone; "
            "restore the store, or start the run again."
        )
    return merge(mine["delta"], offer["increment"])


def merge(delta: Adapter, increment: Adapter) -> Adapter:
    """Both updates as one. Exact; beyond rank ``min(out, in)`` it is compacted, exact but for
    rounding.

    The scales of the two are equal at each site.
    """
    if not delta:
        return increment
    return lean(
        {
            site: Factors(
                torch.cat([old.A, increment[site].A]),
                torch.cat([old.B, increment[site].B], 1),
                old.scale,
            )
            for site, old in delta.items()
        }
    )
