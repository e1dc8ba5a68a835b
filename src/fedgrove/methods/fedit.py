"""FedIT: federated averaging of A and of B, separately.

Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", arXiv
2305.05644. The mean of the factors is not the mean of the products; that difference is what many
later methods correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Plan,
    State,
    Step,
    Trained,
    Update,
    shares,
)
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine


@dataclass
class MeanOfFactors:
    """The mean of the A's and, separately, of the B's."""

    options: contract.Options
    round: Round
    needs: ClassVar[Needs] = Needs(equal_ranks=True, equal_scales=True)

    def site(self, given: Arrived) -> Outcome:
        return Outcome(whole=mean(given.adapters, given.weights)[given.name])


class FedIT(Method):
    name = "fedit"
    title = "FedIT"
    paper = "arXiv 2305.05644"
    trains = "A, B"
    shares = "A, B"
    keeps = "nothing"
    reduce: ClassVar[Literal["sum", "each"]] = "sum"
    stale = True
    averages_factors = True
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    Rule: ClassVar[type[ServerRule]] = MeanOfFactors

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"global": self.setting.shared_draw()}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {"global": state["global"]}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        weights = shares(updates, self.options.weights)
        return {"global": combine(rule, Arrivals(self.setting, adapters, weights)).whole}

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("global", state["global"]),))

    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        return {"adapter": trained[-1].adapter("global")}, mine

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("global", offer["global"]),))
