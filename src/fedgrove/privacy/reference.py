"""What a client would send if it had learnt nothing: what its change is measured from, by it and by
the server alike.

It is the method's own ``report`` of the steps of its own ``plan`` before they train, so no method
has to say it twice. It depends on the offer alone, not on what is private to the client: the server
can make the same.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING

from fedgrove.adapters.tree import Tree, typed
from fedgrove.ground.plain import Given
from fedgrove.methods.contract import Trained

if TYPE_CHECKING:
    from fedgrove.methods.contract import ClientInfo, Method
    from fedgrove.methods.head import HeadPolicy


def untouched(
    method: Method,
    head: HeadPolicy,
    client: ClientInfo,
    offer: Given,
    round: int,
) -> Tree:
    """``{"method": …, "head": …}`` as an update holds them, of a client that received ``offer`` and
    trained nothing.
    """
    content = typed(method.Offer, offer.get("method", {}))
    mine = typed(method.Mine, {})
    plan = method.plan(client, content, mine, round)
    done: list[Trained] = []
    if isinstance(plan, Generator):
        try:
            step = next(plan)
            while True:
                done.append(Trained(step.assembly, math.nan, 0))
                step = plan.send(done[-1])
        except StopIteration:
            pass
    else:
        done = [Trained(step.assembly, math.nan, 0) for step in plan]
    update, _ = method.report(
        client,
        done,
        content,
        mine,
        round,
    )
    sent: Tree = {"method": update}
    start = dict(offer.get("head") or head.initial)
    if head.travels and start:
        sent["head"] = start
    return sent
