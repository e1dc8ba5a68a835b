"""FedEx-LoRA: FedIT's means, plus the residual that they lose, added to the frozen base.

Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", arXiv 2410.09432. ``dW_res = s (sum p_i B_i A_i - mean(B) mean(A))`` goes into
``W0``, so base and adapter together are the exact mean of the products.

Where we differ: the residual travels and is kept as low-rank factors, compacted by SVD (at most
``(N - 1) r`` modules or ``min(out, in)``), never as a dense matrix. A client that was away in the
last round gets the sum of all residuals.
``weights = "uniform"`` is the paper's plain mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.adapters.residual import fedex_residual
from fedgrove.methods import contract
from fedgrove.methods._merged import (
    OWN_MERGED,
    Brought,
    Held,
    Merged,
    advance,
    brought,
    held,
    stays,
)
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Trained,
    Update,
    shares,
)
from fedgrove.methods.records import OneAdapter
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine


@dataclass
class MeanAndResidual:
    """FedIT's means and, for the frozen base, what they lose against the mean of the products."""

    options: contract.Options
    round: Round
    needs: ClassVar[Needs] = Needs(equal_ranks=True, equal_scales=True)

    def site(self, given: Arrived) -> Outcome:
        residual = fedex_residual(given.adapters, given.weights)
        whole = mean(given.adapters, given.weights)
        return Outcome(whole=whole[given.name], base=residual[given.name])


@dataclass(frozen=True, eq=False)
class MeanAndMerged:
    """The server's state: the means of the factors, and all residuals merged so far."""

    whole: Adapter
    merged: Merged


@dataclass(frozen=True, eq=False)
class MeanAndBrought:
    """What goes down: the means of the factors, and the residuals that the client lacks."""

    whole: Adapter
    residual: Brought


class FedExLoRA(Method):
    name = "fedex-lora"
    title = "FedEx-LoRA"
    paper = "arXiv 2410.09432"
    trains = "A, B"
    shares = "A, B"
    keeps = "nothing"
    centres = "weights"
    State, Offer, Mine, Sent = MeanAndMerged, MeanAndBrought, Held, OneAdapter
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    Rule: ClassVar[type[ServerRule]] = MeanAndResidual

    # ------------------------------------------------------------------ server
    def unmeasured(self) -> str:
        return OWN_MERGED

    def begin(self, clients: Sequence[ClientInfo]) -> MeanAndMerged:
        return MeanAndMerged(self.setting.shared_draw(), Merged())

    def offer(
        self,
        state: MeanAndMerged,
        round: int,
        client: ClientInfo,
    ) -> MeanAndBrought:
        return MeanAndBrought(state.whole, brought(state.merged, client))

    def aggregate(
        self,
        state: MeanAndMerged,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> MeanAndMerged:
        adapters = [update.content.adapter for update in updates]
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        weights = shares(updates, self.options.weights)
        made = combine(rule, Arrivals(self.setting, adapters, weights))
        names = [update.client for update in updates]
        return MeanAndMerged(made.whole, advance(state.merged, made.base, names))

    def global_assembly(self, state: MeanAndMerged) -> Assembly:
        return Assembly((Term("global", state.whole),), base_delta=state.merged.delta or None)

    # ------------------------------------------------------------------ client
    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: MeanAndBrought,
        mine: Held,
        round: int,
    ) -> tuple[OneAdapter, Held]:
        return OneAdapter(trained[-1].adapter("global")), stays(trained[-1])

    def personal(
        self,
        client: ClientInfo,
        offer: MeanAndBrought,
        mine: Held,
    ) -> Assembly:
        term = Term("global", offer.whole)
        return Assembly((term,), base_delta=held(offer.residual, mine))
