"""raFLoRA: each rank partition is averaged over the clients that own it, so that high ranks are not
diluted.

Source: Wu et al., "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client
Heterogeneity", arXiv
2602.13486. Between two neighbouring client ranks lies a partition of rank indices; its part of the
update is the mean of ``s_i B_i A_i`` restricted to it over those clients whose rank reaches it. The
sum of the partitions is decomposed by SVD and client i gets the first ``r_i`` directions, as in
FlexLoRA, which this is where all ranks are equal.

Where we differ: a partition that nobody of the round owns keeps the directions of the last global
update; dropping them would make a round without the large clients erase what those learnt.
Directions that the update does not have start again from the shared draw, as in our FlexLoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import Indices, check, concat, index_shares, widen
from fedgrove.adapters.lowrank import product_mean
from fedgrove.methods._products import Truncations, revive
from fedgrove.methods.contract import State, Update, shares


class RaFLoRA(Truncations):
    name = "raflora"
    title = "raFLoRA"
    paper = "arXiv 2602.13486"

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        previous: Adapter = state["global"]
        rank = next(iter(previous.values())).rank
        ideal = partition_mean(adapters, shares(updates, self.options.weights), previous)
        best = product_mean([ideal], None, rank, self.setting.scale(rank), "balanced")
        dtype = next(iter(previous.values())).A.dtype
        narrow = {
            site: factors.map(lambda value: value.to(dtype)) for site, factors in best.items()
        }
        return {"global": revive(narrow, self.setting.shared_draw(rank))}

    def modules(self, update: Update) -> tuple[Adapter, Indices | None]:
        return update.content["adapter"], None


def partition_mean(
    adapters: Sequence[Adapter], weights: Sequence[float], previous: Adapter
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
        for part, adapter, share in zip(
            parts, adapters, index_shares(rows, weights, old.rank), strict=True
        ):
            f = adapter[site]
            part[site] = replace(f, A=f.A.double(), B=f.B.double() * share.to(f.B.device))
        owned = max(adapter[site].rank for adapter in adapters)
        rest[site] = Factors(old.A[owned:], old.B[:, owned:], old.scale)
    return concat([*parts, widen(rest)])
