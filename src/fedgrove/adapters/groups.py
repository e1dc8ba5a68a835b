"""Means of adapters within groups of clients, and over everyone else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import mean, widen
from fedgrove.adapters.centre import shares_of, weighed


@dataclass(frozen=True, eq=False)
class GroupMeans:
    """``own[g]``: the mean of group g; ``rest[g]``: of all outside it (one group of all: {});
    ``everyone``: of all.
    """

    own: list[Adapter]
    rest: list[Adapter]
    everyone: Adapter


def group_means(
    adapters: Sequence[Adapter],
    labels: Sequence[int],
    weights: Sequence[float],
) -> GroupMeans:
    """The weighted means of A and, separately, of B inside and outside each group
    ``0..max(labels)``.

    Each ``own`` is ``algebra.mean`` of its members, so that one group of all is FedIT's mean bit
    for bit. Sums run in float64, and the outside is added up from the other groups, never
    subtracted from the total: nothing cancels. Raises AdapterError where ranks, scales or sites
    differ.
    """
    like = adapters[0]
    count = max(labels) + 1
    means: list[Adapter] = []
    sums: list[float] = []
    for group in range(count):
        members = [i for i, label in enumerate(labels) if label == group]
        total = sum(weights[i] for i in members)
        inside = [adapters[i] for i in members]
        shares = shares_of(inside, [weights[i] / total for i in members])
        wide = [widen(each) for each in inside]
        sums.append(total)
        with weighed():
            means.append(mean(wide, shares))
    own = [_narrow(each, like) for each in means]
    if count == 1:
        return GroupMeans(own, [{}], own[0])
    before = _running(means, sums)
    after = _running(means[::-1], sums[::-1])
    after.reverse()
    rest: list[Adapter] = []
    for group in range(count):
        sides = [before[group], after[group + 1]]
        weight = sum(sums[:group]) + sum(sums[group + 1 :])
        outside = _average(sides, weight)
        rest.append(_narrow(outside, like))
    everyone = _average(before[-1:], sum(sums))
    return GroupMeans(own, rest, _narrow(everyone, like))


def _average(sums: Sequence[Adapter], weight: float) -> Adapter:
    """What the weighted sums that are not empty add up to, divided by the whole weight."""
    parts = [part for part in sums if part]
    share = 1.0 / weight
    return _total(parts, [share] * len(parts))


def _running(
    means: Sequence[Adapter],
    weights: Sequence[float],
) -> list[Adapter]:
    """Weighted sums of the first 0, 1, 2, ... adapters; of none: {}."""
    sums: list[Adapter] = [{}]
    for each, weight in zip(means, weights, strict=True):
        last = sums[-1]
        if last:
            more = _total([last, each], [1.0, weight])
        else:
            more = _total([each], [weight])
        sums.append(more)
    return sums


def _total(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
) -> Adapter:
    """``Σ w A`` and ``Σ w B`` at each site, in the adapters' precision."""
    result: Adapter = {}
    for site, first in adapters[0].items():
        A = weights[0] * first.A
        B = weights[0] * first.B
        for adapter, weight in zip(adapters[1:], weights[1:], strict=True):
            factors = adapter[site]
            A = A + weight * factors.A
            B = B + weight * factors.B
        result[site] = Factors(A, B, first.scale)
    return result


def _narrow(adapter: Adapter, like: Adapter) -> Adapter:
    """The same numbers in the dtypes of ``like``."""
    result: Adapter = {}
    for site, factors in adapter.items():
        wanted = like[site]
        A = factors.A.to(wanted.A.dtype)
        B = factors.B.to(wanted.B.dtype)
        result[site] = Factors(A, B, factors.scale)
    return result
