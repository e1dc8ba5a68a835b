"""Means of adapters within groups of clients, and over everyone else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import mean, widen


@dataclass(frozen=True, eq=False)
class GroupMeans:
    """``own[g]``: the mean of group g; ``rest[g]``: of all outside it (one group of all: {});
    ``everyone``: of all.
    """

    own: list[Adapter]
    rest: list[Adapter]
    everyone: Adapter


def group_means(
    adapters: Sequence[Adapter], labels: Sequence[int], weights: Sequence[float]
) -> GroupMeans:
    """The weighted means of A and, separately, of B inside and outside each group
    ``0..max(labels)``.

    Each ``own`` is ``algebra.mean`` of its members, so that one group of all is FedIT's mean bit
    for bit. Sums run in float64, and the outside is added up from the other groups, never
    subtracted from the total: nothing cancels. Raises AdapterError where ranks, scales or sites
    differ.
    """
    members = [
        [i for i, label in enumerate(labels) if label == group] for group in range(max(labels) + 1)
    ]
    sums = [sum(weights[i] for i in group) for group in members]
    means = [
        mean([widen(adapters[i]) for i in group], [weights[i] / total for i in group])
        for group, total in zip(members, sums, strict=True)
    ]
    own = [_narrow(each, adapters[0]) for each in means]
    if len(members) == 1:
        return GroupMeans(own, [{}], own[0])
    before, after = _running(means, sums), _running(means[::-1], sums[::-1])[::-1]
    rest = []
    for group in range(len(members)):
        outside = [part for part in (before[group], after[group + 1]) if part]
        weight = sum(sums[:group]) + sum(sums[group + 1 :])
        rest.append(_narrow(_total(outside, [1.0 / weight] * len(outside)), adapters[0]))
    return GroupMeans(own, rest, _narrow(_total(before[-1:], [1.0 / sum(sums)]), adapters[0]))


def _running(means: Sequence[Adapter], weights: Sequence[float]) -> list[Adapter]:
    """Weighted sums of the first 0, 1, 2, ... adapters; of none: {}."""
    sums: list[Adapter] = [{}]
    for each, weight in zip(means, weights, strict=True):
        sums.append(
            _total([sums[-1], each], [1.0, weight]) if sums[-1] else _total([each], [weight])
        )
    return sums


def _total(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """``Σ w A`` and ``Σ w B`` at each site, in the adapters' precision."""
    result: Adapter = {}
    for site, first in adapters[0].items():
        A, B = weights[0] * first.A, weights[0] * first.B
        for adapter, weight in zip(adapters[1:], weights[1:], strict=True):
            A, B = A + weight * adapter[site].A, B + weight * adapter[site].B
        result[site] = Factors(A, B, first.scale)
    return result


def _narrow(adapter: Adapter, like: Adapter) -> Adapter:
    """The same numbers in the dtypes of ``like``."""
    return {
        site: Factors(
            factors.A.to(like[site].A.dtype), factors.B.to(like[site].B.dtype), factors.scale
        )
        for site, factors in adapter.items()
    }
