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

from fedgrove.adapters.lowrank import product_mean
from fedgrove.methods._products import Truncations, revive
from fedgrove.methods.contract import ClientInfo, State, Update, shares


class FlexLoRA(Truncations):
    name = "flexlora"
    title = "FlexLoRA"
    paper = "arXiv 2402.11505"
    stale = True

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {**super().begin(clients), "largest": max(client.rank for client in clients)}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        largest = state["largest"]
        weights = shares(updates, self.options.weights)
        arrived = sum(next(iter(adapter.values())).rank for adapter in adapters)
        rank = largest if arrived < largest else None  # None: every direction of the mean
        exact = product_mean(adapters, weights, rank, self.setting.scale(largest), "balanced")
        return {"global": revive(exact, self.setting.shared_draw(largest)), "largest": largest}
