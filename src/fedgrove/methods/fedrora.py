"""FedRoRA: unit directions with learnable strengths; each client gets its own strengths along the
directions of the mean that it uses most.

Source: FedRoRA, arXiv 2609.00632, and its authors' code. ``dW = B~ S A~`` with unit columns of B~,
unit rows of A~ and a learnable diagonal S that has a learning rate of its own. The server takes the
leading singular vectors u_k, v_k of ``sum p_i dW_i`` at ``r_max``. Client i's coefficients along
them, ``s_k = u_k^T dW_i v_k``, are its own: it gets the ``r_i`` directions where they are largest,
and them as its S. The authors' code picks by ``|s_k|`` (our default), the paper by ``s_k``.

As the authors' code has it, there is no ``alpha / r``, both directions start from random draws and
S from ``1 / sqrt(r_i)``, so that the first update is not zero.

Where we differ: the mean is by examples (the authors' clients are of equal size), and the random
directions are one draw for all clients. ``dW_i`` is the last update that the server has of client
i, also from an earlier round; a client that never trained gets the leading directions with the
mean's own strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.assembly import Assembly, Term, as_one_adapter, unit_rows
from fedgrove.adapters.lowrank import product_svd
from fedgrove.ground.errors import JobError
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Trained,
    Update,
    shares,
)

SCALE = 1.0  # S alone carries the magnitude


class RoRAOptions(contract.WeightedOptions):
    """The keys of ``[method]`` for FedRoRA."""

    selection: Literal["magnitude", "value"] = Field(
        "magnitude",
        description="A client gets the directions with the largest |s_k| (the authors' code) or "
        "with the largest s_k (the paper).",
    )
    strength_lr: float = Field(
        100.0,
        gt=0,
        description="Learning rate of the strengths S, in units of train.lr (the authors: 5e-2 "
        "against 5e-4).",
    )


@dataclass(frozen=True, eq=False)
class Directions:
    """Rank-1 directions and their strengths: ``dW = sum_k S_k u_k v_k^T`` at each site.

    ``adapter`` has u_k as columns of B and v_k as rows of A, which run at unit length;
    ``strengths`` is site -> [rank].
    """

    adapter: Adapter
    strengths: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class RoRAState:
    """The server's memory; ``latest`` is client -> its last update as plain factors."""

    whole: Directions
    latest: dict[str, Adapter] = field(default_factory=dict)
    trained: bool = False  # whether ``whole`` is of an update yet


class FedRoRA(Method):
    name = "fedrora"
    title = "FedRoRA"
    paper = "arXiv 2609.00632"
    trains = "A, B, S"
    shares = "A, B, S"
    keeps = "nothing"
    ranks = "mixed"
    State, Offer, Sent = RoRAState, Directions, Directions
    Options: ClassVar[type[contract.Options]] = RoRAOptions
    no_rule = (
        "its factors have unit length and a diagonal of their own, which a PEFT adapter "
        "directory does not hold"
    )

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        if self.setting.rslora:
            raise JobError(
                "lora.rslora = true has no use with FedRoRA, whose update has no alpha; leave it out."
            )

    def begin(self, clients: Sequence[ClientInfo]) -> RoRAState:
        rng = self.setting.rng("shared", "directions of B")
        rank = max(client.rank for client in clients)
        adapter: Adapter = {}
        for site, f in self.setting.shared_draw(rank).items():
            columns = torch.randn(
                f.rank,
                f.B.shape[0],
                generator=rng,
                dtype=torch.float64,
            )
            B = unit_rows(columns).T.contiguous().to(f.B.dtype)
            adapter[site] = Factors(unit_rows(f.A), B, SCALE)
        return RoRAState(_even(adapter, rank))

    def offer(
        self,
        state: RoRAState,
        round: int,
        client: ClientInfo,
    ) -> Directions:
        if not state.trained:
            return _even(state.whole.adapter, client.rank)
        update = state.latest.get(client.name)
        if update is None:
            return _leading(state.whole, client.rank)
        by_value = self.options.selection == "value"
        return own_directions(state.whole.adapter, update, client.rank, by_value=by_value)

    def aggregate(
        self,
        state: RoRAState,
        round: int,
        updates: Sequence[Update[Directions]],
    ) -> RoRAState:
        folded = {each.client: self._folded(each.content) for each in updates}
        rank = next(iter(state.whole.adapter.values())).rank
        weights = shares(updates, self.options.weights)
        adapter: Adapter = {}
        strengths: dict[str, Tensor] = {}
        for site in self.setting.sites:
            arrived = [update[site] for update in folded.values()]
            u, s, vh = product_svd(arrived, weights, rank)
            adapter[site] = Factors(A=vh, B=u, scale=SCALE)
            strengths[site] = s
        latest = {**state.latest, **folded}
        return RoRAState(Directions(adapter, strengths), latest, trained=True)

    def global_assembly(self, state: RoRAState) -> Assembly:
        return self._assembly(state.whole)

    # ------------------------------------------------------------------ client
    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Directions,
        mine: Mine,
        round: int,
    ) -> tuple[Directions, Mine]:
        term = trained[-1].assembly.term("adapter")
        return Directions(term.adapter, dict(term.diagonal or {})), mine

    def personal(
        self,
        client: ClientInfo,
        offer: Directions,
        mine: Mine,
    ) -> Assembly:
        return self._assembly(offer)

    def _assembly(self, given: Directions) -> Assembly:
        term = Term(
            "adapter",
            given.adapter,
            train="ABD",
            diagonal=given.strengths,
            unit=True,
            diagonal_lr=self.options.strength_lr,
        )
        return Assembly((term,))

    def _folded(self, given: Directions) -> Adapter:
        """The update ``B~ S A~`` as plain factors."""
        return as_one_adapter(self._assembly(given), self.setting.sites)


def own_directions(
    adapter: Adapter,
    update: Adapter,
    rank: int,
    *,
    by_value: bool,
) -> Directions:
    """At each site the ``rank`` directions with the largest coefficients of the client's own
    ``update`` (in magnitude, or ``by_value`` with their sign), ascending, and these coefficients.
    """
    chosen: Adapter = {}
    strengths: dict[str, Tensor] = {}
    for site, f in adapter.items():
        found = coefficients(f, update[site])
        score = found
        if not by_value:
            score = found.abs()
        best = torch.argsort(score, descending=True, stable=True)[:rank].sort().values
        chosen[site] = Factors(
            f.A[best],
            f.B[:, best],
            f.scale,
        )
        strengths[site] = found[best].to(f.A.dtype)
    return Directions(chosen, strengths)


def coefficients(directions: Factors, update: Factors) -> Float[Tensor, " rank"]:
    """``u_k^T dW v_k`` for each direction, in float64; u_k are the columns of B [out, rank], v_k
    the rows of A [rank, in].
    """
    u, v = directions.B.double(), directions.A.double()
    left = u.T @ update.B.double()
    right = update.A.double() @ v.T
    return update.scale * (left * right.T).sum(1)


def _even(adapter: Adapter, rank: int) -> Directions:
    """The first ``rank`` directions with the strengths that training starts from."""
    strengths = {
        site: torch.full((f.rank,), rank**-0.5, dtype=f.A.dtype) for site, f in adapter.items()
    }
    return _leading(Directions(adapter, strengths), rank)


def _leading(given: Directions, rank: int) -> Directions:
    """The first ``rank`` directions as they are."""
    adapter = {
        site: Factors(f.A[:rank], f.B[:, :rank].contiguous(), f.scale)
        for site, f in given.adapter.items()
    }
    strengths = {site: values[:rank] for site, values in given.strengths.items()}
    return Directions(adapter, strengths)
