"""FedIT: federated averaging of A and of B, separately.

Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv
2305.05644. The mean of the factors is not the mean of the products; that difference is what many
later methods correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Trained,
    Update,
    shares,
)
from fedgrove.methods.protocols import Summable
from fedgrove.methods.records import OneAdapter, Whole
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine


@dataclass
class MeanOfFactors:
    """The mean of the A's and, separately, of the B's (and of DoRA's magnitudes)."""

    options: contract.Options
    round: Round
    needs: ClassVar[Needs] = Needs(equal_ranks=True, equal_scales=True, magnitudes=True)

    def site(self, given: Arrived) -> Outcome:
        return Outcome(whole=mean(given.adapters, given.weights)[given.name])


class FedIT(Method, Summable):
    name = "fedit"
    title = "FedIT"
    paper = "arXiv 2305.05644"
    trains = "A, B"
    shares = "A, B"
    keeps = "nothing"
    stale = True
    averages_factors = True
    centres = "values"
    State, Offer, Sent = Whole, Whole, OneAdapter
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    Rule: ClassVar[type[ServerRule]] = MeanOfFactors

    def begin(self, clients: Sequence[ClientInfo]) -> Whole:
        return Whole(self.setting.shared_draw())

    def offer(
        self,
        state: Whole,
        round: int,
        client: ClientInfo,
    ) -> Whole:
        return state

    def aggregate(
        self,
        state: Whole,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> Whole:
        adapters = [update.content.adapter for update in updates]
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        weights = shares(updates, self.options.weights)
        return Whole(combine(rule, Arrivals(self.setting, adapters, weights)).whole)

    def global_assembly(self, state: Whole) -> Assembly:
        return Assembly((Term("global", state.whole),))

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Whole,
        mine: Mine,
        round: int,
    ) -> tuple[OneAdapter, Mine]:
        return OneAdapter(trained[-1].adapter("global")), mine

    def personal(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Mine,
    ) -> Assembly:
        return Assembly((Term("global", offer.whole),))
