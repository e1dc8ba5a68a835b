"""FlexLoRA: the mean of the products, handed out as each client's own truncation of its SVD.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", arXiv 2402.11505. ``dW = sum p_i s_i B_i A_i``; client i gets its best
approximation of rank ``r_i`` as ``B = U sqrt(S)``, ``A = sqrt(S) V^T``, divided by its scale so
that ``s B A`` is right (re-implementations that lose
``sqrt(S)`` are not followed).

The server keeps the whole mean (at most the clients' ranks together, or the layer's smaller side),
so nothing is lost in aggregation, only in what a client of a smaller rank can hold.

Where we differ: the SVD is taken of the factors by QR, never of the dense update. A direction that
the mean does not have (fewer modules arrived than the recipient holds) starts again from the shared
draw of A with B = 0 instead of from zero in both factors, where it could never train; the product
is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedgrove.adapters.lowrank import leading, truncated
from fedgrove.methods import contract
from fedgrove.methods._products import Truncations
from fedgrove.methods.contract import ClientInfo, State, Update, shares
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine


@dataclass
class TruncatedMean:
    """The mean of the products; each client's truncation of it at the client's own rank."""

    options: contract.Options
    round: Round
    needs: ClassVar[Needs] = Needs(rank=True)

    def site(self, given: Arrived) -> Outcome:
        most = max(given.rank, *(each.rank for each in given.factors))
        best = truncated(
            given.factors, given.weights, most, given.scale, start=given.start, site=given.name
        )
        return Outcome(
            whole=leading(best, given.rank, given.scale),
            own=[leading(best, each.rank, each.scale) for each in given.factors],
        )


class FlexLoRA(Truncations):
    name = "flexlora"
    title = "FlexLoRA"
    paper = "arXiv 2402.11505"
    stale = True
    Rule: ClassVar[type[ServerRule]] = TruncatedMean

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {**super().begin(clients), "largest": max(client.rank for client in clients)}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        largest = state["largest"]
        arrived = sum(next(iter(adapter.values())).rank for adapter in adapters)
        ranks = {}  # every direction of the mean, and never fewer than anybody holds
        for name, site in self.setting.sites.items():
            ranks[name] = max(largest, min(arrived, site.in_features, site.out_features))
        arrivals = Arrivals(
            self.setting,
            adapters,
            shares(updates, self.options.weights),
            rank=ranks,
            scale=self.setting.scale(largest),
            start=self.setting.shared_draw(largest),
        )
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        return {"global": combine(rule, arrivals).whole, "largest": largest}
