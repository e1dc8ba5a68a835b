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
from typing import Any, ClassVar

from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.adapters.residual import fedex_residual
from fedgrove.methods import contract
from fedgrove.methods._merged import advance, held, merged_part, nothing_merged
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
class MeanAndResidual:
    """FedIT's means and, for the frozen base, what they lose against the mean of the products."""

    options: contract.Options
    round: Round
    needs: ClassVar[Needs] = Needs(equal_ranks=True, equal_scales=True)

    def site(self, given: Arrived) -> Outcome:
        residual = fedex_residual(given.adapters, given.weights)
        return Outcome(
            whole=mean(given.adapters, given.weights)[given.name], base=residual[given.name]
        )


class FedExLoRA(Method):
    name = "fedex-lora"
    title = "FedEx-LoRA"
    paper = "arXiv 2410.09432"
    trains = "A, B"
    shares = "A, B"
    keeps = "nothing"
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    Rule: ClassVar[type[ServerRule]] = MeanAndResidual

    # ------------------------------------------------------------------ server
    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"global": self.setting.shared_draw(), **nothing_merged()}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {"global": state["global"], **merged_part(state, client)}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        weights = shares(updates, self.options.weights)
        made = combine(rule, Arrivals(self.setting, adapters, weights))
        names = [update.client for update in updates]
        return {"global": made.whole, **advance(state, made.base, names)}

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("global", state["global"]),), base_delta=state["delta"] or None)

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        base = trained[-1].assembly.base_delta or {}
        return {"adapter": trained[-1].adapter("global")}, {"delta": base}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("global", offer["global"]),), base_delta=held(offer, mine) or None)
