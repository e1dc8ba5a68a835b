"""raFLoRA: each rank partition is averaged over the clients that own it, so that high ranks are not
diluted.

Source: Wu et al., "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client
Heterogeneity", arXiv
2602.13486. Between two neighbouring client ranks lies a partition of rank indices; its part of the
update is the mean of ``s_i B_i A_i`` restricted to it over those clients whose rank reaches it. The
sum of the partitions is decomposed by SVD and client i gets the first ``r_i`` directions, as in
FlexLoRA, which this is where all ranks are equal; ``split`` is FlexLoRA's (no code of the authors
is public).

Where we differ: a partition that nobody of the round owns keeps the directions of the last global
update; dropping them would make a round without the large clients erase what those learnt.
Directions that the update does not have start again from the shared draw, as in our FlexLoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import Indices, check, concat, index_shares, widen
from fedgrove.adapters.lowrank import leading, truncated
from fedgrove.methods._products import SplitOptions, Truncations
from fedgrove.methods.contract import Update, shares
from fedgrove.methods.records import OneAdapter, Whole
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine


@dataclass
class TruncatedPartitions:
    """The sum of the partitions' means; each client's truncation of it at the client's own rank."""

    options: SplitOptions
    round: Round
    needs: ClassVar[Needs] = Needs(rank=True, previous=True, by_index="first", options=("split",))

    def site(self, given: Arrived) -> Outcome:
        name = given.name
        largest = max(each.rank for each in given.factors)
        old = given.old(largest)
        means = partition_mean(given.adapters, given.weights, {name: old})
        side = self.options.side
        best = truncated(
            [means[name]],
            None,
            max(given.rank, largest),
            given.scale,
            side,
            given.start,
            name,
        )
        best = best.map(lambda value: value.to(old.A.dtype))
        whole = leading(best, given.rank, given.scale, side)
        own = [leading(best, each.rank, each.scale, side) for each in given.factors]
        return Outcome(whole=whole, own=own)


class RaFLoRA(Truncations):
    name = "raflora"
    title = "raFLoRA"
    paper = "arXiv 2602.13486"
    Rule: ClassVar[type[ServerRule]] = TruncatedPartitions

    def aggregate(
        self,
        state: Whole,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> Whole:
        adapters = [update.content.adapter for update in updates]
        rank = next(iter(state.whole.values())).rank
        arrivals = Arrivals(
            self.setting,
            adapters,
            shares(updates, self.options.weights),
            rank=rank,
            scale=self.setting.scale(rank),
            previous=state.whole,
            start=self.setting.shared_draw(rank),
        )
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        return Whole(combine(rule, arrivals).whole)

    def modules(self, update: Update[OneAdapter]) -> tuple[Adapter, Indices | None]:
        return update.content.adapter, None


def partition_mean(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    previous: Adapter,
) -> Adapter:
    """``sum_j sum_{i: r_i > j} w_ij s_i B_i[:, j] A_i[j]``, weights normalised over the owners of
    each index, float64.

    All indices of one partition have the same owners, so this is the paper's sum over partitions.
    Indices that nobody owns are those of ``previous``. AdapterError for adapters that do not fit
    together.
    """
    check([previous, *adapters])
    parts: list[Adapter] = [{} for _ in adapters]
    rest: Adapter = {}
    for site, old in previous.items():
        rows = [torch.arange(adapter[site].rank) for adapter in adapters]
        portions = index_shares(rows, weights, old.rank)
        for part, adapter, portion in zip(parts, adapters, portions, strict=True):
            factors = adapter[site]
            there = portion.to(factors.B.device)
            part[site] = replace(
                factors,
                A=factors.A.double(),
                B=factors.B.double() * there,
            )
        owned = max(adapter[site].rank for adapter in adapters)
        rest[site] = Factors(
            old.A[owned:],
            old.B[:, owned:],
            old.scale,
        )
    return concat([*parts, widen(rest)])
