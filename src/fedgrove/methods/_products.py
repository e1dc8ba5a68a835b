"""What FlexLoRA and raFLoRA share: the server's truncated SVD of an update, handed out by leading
directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import truncate
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods.contract import ClientInfo, Method, Mine, Offer, Plan, State, Step, Trained


class Truncations(Method):
    """The server keeps the SVD of its update at the largest rank; each client trains the first
    ``r_i`` directions.
    """

    trains = "A, B"
    shares = "A, B"
    keeps = "nothing"
    ranks = "mixed"
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"global": self.setting.shared_draw(max(client.rank for client in clients))}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {"adapter": leading(state["global"], client.rank, self.setting.scale(client.rank))}

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("adapter", state["global"]),))

    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        return {"adapter": trained[-1].adapter("adapter")}, mine

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("adapter", offer["adapter"]),))


def leading(adapter: Adapter, rank: int, scale: float) -> Adapter:
    """The first ``rank`` modules for a recipient of scale ``scale``; both factors take an equal
    part of the change.
    """
    result: Adapter = {}
    for site, factors in truncate(adapter, rank).items():
        change = math.sqrt(factors.scale / scale)
        same = change == 1.0
        result[site] = factors if same else Factors(factors.A * change, factors.B * change, scale)
    return result


def revive(adapter: Adapter, draw: Mapping[str, Factors]) -> Adapter:
    """Give every zero module the row of A that it was first drawn with; its B becomes zero, so no
    product changes.

    A balanced SVD puts the root of a singular value into both factors, so a direction that the
    update does not have (fewer modules arrived than the recipient holds) would be zero in both,
    from where no gradient moves it.
    """
    result: Adapter = {}
    for site, f in adapter.items():
        rows = draw[
            site
        ].rank  # an exact mean may have more modules than anybody holds; those need no new start
        size = f.B.double().norm(dim=0) * f.A.double().norm(dim=1)
        noise = size.max() * max(f.B.shape[0], f.A.shape[1]) * torch.finfo(torch.float64).eps
        zero = size <= noise
        start = torch.zeros_like(f.A)
        start[:rows] = draw[site].A[: f.rank].to(f.A)
        result[site] = replace(
            f, A=torch.where(zero[:, None], start, f.A), B=torch.where(zero, 0.0, f.B)
        )
    return result
