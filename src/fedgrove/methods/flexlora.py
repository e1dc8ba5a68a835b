"""FlexLoRA: the mean of the products, handed out as each client's own truncation of its SVD.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", arXiv 2402.11505. ``dW = sum p_i s_i B_i A_i``; client i gets its best
approximation of rank ``r_i`` as ``B = U S / s_i``, ``A = V^T``, as the authors' code splits it
(github.com/alibaba/FederatedScope, branch FlexLoRA at 1cb1ab7, adaptive_peft.py). With ``split =
"balanced"`` the roots ``sqrt(S / s_i)`` go into both factors; re-implementations that lose them in
one are not followed. The product is the same, what training makes of it is not.

The server keeps the whole mean (at most the clients' ranks together, or the layer's smaller side),
so nothing is lost in aggregation, only in what a client of a smaller rank can hold.

Where we differ: the SVD is taken of the factors by QR, never of the dense update. Where the roots
are in both, a direction that the mean does not have (fewer modules arrived than the recipient
holds) starts again from the shared draw of A with B = 0 instead of from zero in both factors, where
it could never train; the product is the same. Round 1 starts from the shared draw of A as it is,
whatever a client's scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedgrove.adapters.lowrank import leading, truncated
from fedgrove.methods._products import SplitOptions, Truncations
from fedgrove.methods.contract import ClientInfo, Update, shares
from fedgrove.methods.records import OneAdapter, Whole
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine


@dataclass
class TruncatedMean:
    """The mean of the products; each client's truncation of it at the client's own rank."""

    options: SplitOptions
    round: Round
    needs: ClassVar[Needs] = Needs(rank=True, options=("split",))

    def site(self, given: Arrived) -> Outcome:
        most = max(given.rank, *(each.rank for each in given.factors))
        side = self.options.side
        best = truncated(
            given.factors,
            given.weights,
            most,
            given.scale,
            side,
            given.start,
            given.name,
        )
        return Outcome(
            whole=leading(best, given.rank, given.scale, side),
            own=[leading(best, each.rank, each.scale, side) for each in given.factors],
        )


@dataclass(frozen=True, eq=False)
class WholeMean(Whole):
    """The server's state: the mean, of more modules than any client holds."""

    largest: int  # rank of a client


class FlexLoRA(Truncations):
    name = "flexlora"
    title = "FlexLoRA"
    paper = "arXiv 2402.11505"
    stale = True
    State = WholeMean
    Rule: ClassVar[type[ServerRule]] = TruncatedMean

    def begin(self, clients: Sequence[ClientInfo]) -> WholeMean:
        largest = max(client.rank for client in clients)
        return WholeMean(self.setting.shared_draw(largest), largest)

    def aggregate(
        self,
        state: Whole,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> WholeMean:
        assert isinstance(state, WholeMean)
        adapters = [update.content.adapter for update in updates]
        largest = state.largest
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
        return WholeMean(combine(rule, arrivals).whole, largest)
