"""FedRoRA: unit directions with learnable strengths; each client gets the directions that its own
update uses most.

Source: FedRoRA, of which we know the published description and comparison with Fed-PLoRA, and no
identifier. ``dW = s B~ S A~`` with unit columns of B~, unit rows of A~ and a learnable diagonal S.
The server takes the SVD of ``sum p_i dW_i`` at ``r_max``, and client i gets the ``r_i`` directions
k with the largest ``u_k^T dW_i v_k``.

Where we differ (what the description leaves open): the start is A's shared draw, a shared draw of B
and S = 0, so that the update is zero while both directions are alive. ``dW_i`` is the last update
that the server has of client i, also from an earlier round; a client that never trained gets the
directions with the largest singular values. Directions are chosen at each site by itself, from the
signed score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import select
from fedgrove.adapters.assembly import Assembly, Term, as_one_adapter, unit_rows
from fedgrove.adapters.lowrank import product_svd
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

Diagonal = dict[str, Tensor]


class FedRoRA(Method):
    name = "fedrora"
    title = "FedRoRA"
    paper = "FedRoRA (no identifier known)"
    trains = "A, B, S"
    shares = "A, B, S"
    keeps = "nothing"
    ranks = "mixed"
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    no_rule = (
        "its factors have unit length and a diagonal of their own, which a PEFT adapter "
        "directory does not hold"
    )

    # ------------------------------------------------------------------ server
    def begin(self, clients: Sequence[ClientInfo]) -> State:
        """``global`` has unit columns and rows, ``diagonal`` their strengths at its scale,
        ``latest`` is by client.
        """
        rng = self.setting.rng("shared", "directions of B")
        adapter: Adapter = {}
        for site, f in self.setting.shared_draw(max(client.rank for client in clients)).items():
            columns = torch.randn(f.rank, f.B.shape[0], generator=rng, dtype=torch.float64)
            adapter[site] = Factors(
                unit_rows(f.A), unit_rows(columns).T.contiguous().to(f.B.dtype), f.scale
            )
        zero = {site: torch.zeros(f.rank, dtype=f.A.dtype) for site, f in adapter.items()}
        return {"global": adapter, "diagonal": zero, "latest": {}}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        chosen = best_directions(state["global"], state["latest"].get(client.name), client.rank)
        scale = self.setting.scale(client.rank)
        adapter, diagonal = select(state["global"], chosen), {}
        for site, factors in adapter.items():
            diagonal[site] = state["diagonal"][site][chosen[site]] * (factors.scale / scale)
            adapter[site] = Factors(factors.A, factors.B, scale)
        return {"adapter": adapter, "diagonal": diagonal}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        folded = {
            u.client: self._folded(u.content["adapter"], u.content["diagonal"]) for u in updates
        }
        rank = next(iter(state["global"].values())).rank
        weights = shares(updates, self.options.weights)
        scale = self.setting.scale(rank)
        adapter: Adapter = {}
        diagonal: Diagonal = {}
        for site in self.setting.sites:
            u, s, vh = product_svd([update[site] for update in folded.values()], weights, rank)
            adapter[site] = Factors(A=vh, B=u, scale=scale)
            diagonal[site] = s / scale
        return {"global": adapter, "diagonal": diagonal, "latest": {**state["latest"], **folded}}

    def global_assembly(self, state: State) -> Assembly:
        return _assembly(state["global"], state["diagonal"])

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        term = trained[-1].assembly.term("adapter")
        return {"adapter": term.adapter, "diagonal": dict(term.diagonal or {})}, mine

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return _assembly(offer["adapter"], offer["diagonal"])

    def _folded(self, adapter: Adapter, diagonal: Diagonal) -> Adapter:
        """The update ``s B~ S A~`` as plain factors."""
        return as_one_adapter(_assembly(adapter, diagonal), self.setting.sites)


def best_directions(adapter: Adapter, update: Adapter | None, rank: int) -> dict[str, list[int]]:
    """Per site the indices, ascending, of the ``rank`` directions k with the largest ``u_k^T dW
    v_k``.

    ``adapter`` holds u_k as columns of B and v_k as rows of A; without an ``update`` dW the first
    ``rank``.
    """
    chosen: dict[str, list[int]] = {}
    for site, f in adapter.items():
        if update is None:
            chosen[site] = list(range(min(rank, f.rank)))
            continue
        own = update[site].map(Tensor.double)
        score = own.scale * ((f.B.double().T @ own.B) * (own.A @ f.A.double().T).T).sum(1)
        chosen[site] = sorted(torch.argsort(score, descending=True, stable=True)[:rank].tolist())
    return chosen


def _assembly(adapter: Adapter, diagonal: Diagonal) -> Assembly:
    return Assembly((Term("adapter", adapter, train="ABD", diagonal=diagonal, unit=True),))
