"""A newcomer of a run, answered for by those who trained: the mean of what a router gave them on its
own training rows, as one adapter. No step is made.
"""

from __future__ import annotations

import torch

from fedgrove.adapters.assembly import Assembly, Term, Weighted
from fedgrove.pools import build
from fedgrove.pools.members import members, places
from fedgrove.pools.pool import TOP, Pool, planned, routes
from fedgrove.use.adapt import Arrived


def by_routing(arrived: Arrived) -> tuple[str, Assembly]:
    """The run's members, each weighed by the mean weight that Arrow, which knows nothing of data,
    gives it on the newcomer's training rows (``use.adapt.Way``).
    """
    found = members(places([arrived.result.path]))
    plan = planned("arrow", None, min(TOP, len(found)), {})
    pool = Pool(found, plan, arrived.half.kernel)
    table = routes(
        pool.kernel,
        pool.assembly,
        pool.names,
        arrived.examples["train"],
    )
    weights = table.weights.mean(0)
    heads = build.heads_of(found, pool.fallback)
    terms = tuple(Term(each.name, each.adapter, train="") for each in found)
    mix = Weighted(dict(zip(pool.names, weights.tolist(), strict=True)))
    head = {
        name: torch.einsum(
            "n,n...->...",
            weights.to(value.dtype),
            torch.stack([h[name] for h in heads]),
        )
        for name, value in heads[0].items()
    }
    return "by routing", Assembly(terms, mix, build.head_extras(head))
