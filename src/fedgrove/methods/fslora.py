"""FSLoRA: each client trains a random sketch of the global adapter, drawn anew each round.

Source: Fang et al., "Federated Sketching LoRA: On-Device Collaborative Fine-Tuning of Large
Language Models", arXiv
2501.19389. Client i runs ``W0 + s B S_i A`` with ``S_i = (R / k_i) diag(mask)``, the mask uniform
with ``k_i`` ones; the server adds the mean over all sampled clients of the changes ``dA_i, dB_i``,
which are zero outside the mask.
``k_i`` is the client's rank.

Where we differ: the masked-out modules have no part in the forward pass and no gradient, so a
client runs the ``k_i`` others as one dense adapter of scale ``s R / k_i`` and sends their changes
with their indices; weight decay then leaves the others alone too. One mask serves all sites. What a
client deploys is the whole global adapter. Public code finds the adapters by a test of their names
that never matches; ours has no such test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import select
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.ground.errors import JobError
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Plan,
    Step,
    Trained,
    Update,
    WeightedOptions,
    shares,
)
from fedgrove.methods.records import Whole


class SketchOptions(WeightedOptions):
    """FSLoRA's keys."""

    weights: Literal["examples", "uniform"] = Field(
        "uniform",
        description="Weight of a client in the mean: the same for all (the paper's), or its "
        "examples.",
    )


@dataclass(frozen=True, eq=False)
class Change:
    """What training changed in one site's k modules."""

    A: Tensor  # [k, in]
    B: Tensor  # [out, k]


@dataclass(frozen=True, eq=False)
class Sketched:
    """What training changed in the modules of the sketch."""

    change: dict[str, Change]
    indices: list[int]  # the modules' places among all R, ascending


class FSLoRA(Method):
    name = "fslora"
    title = "FSLoRA"
    paper = "arXiv 2501.19389"
    trains = "r_i of R modules"
    shares = "their changes"
    keeps = "nothing"
    ranks = "mixed"
    State, Offer, Sent = Whole, Whole, Sketched
    Options: ClassVar[type[contract.Options]] = SketchOptions
    no_rule = (
        "it averages changes since the start of the round under random masks, which a "
        "directory does not hold"
    )

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        setting = self.setting
        for client in clients:
            if setting.scaling == "client" and client.rank != setting.rank:
                raise JobError(
                    f'lora.scaling = "client" gives {client.name} the scale alpha / {client.rank}, '
                    f"but the sketch corrects alpha / {setting.rank} for the smaller rank by "
                    f'itself; set lora.scaling = "global".'
                )

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
        updates: Sequence[Update[Sketched]],
    ) -> Whole:
        weights = shares(updates, self.options.weights)
        result: Adapter = {}
        for site, old in state.whole.items():
            a, b = old.A.double().clone(), old.B.double().clone()
            for update, weight in zip(updates, weights, strict=True):
                change, rows = update.content.change[site], update.content.indices
                a[rows] += weight * change.A.double()
                b[:, rows] += weight * change.B.double()
            result[site] = Factors(
                a.to(old.A.dtype),
                b.to(old.B.dtype),
                old.scale,
            )
        return Whole(result)

    def addend(self, content: Sketched, offer: Whole) -> Sketched:
        rank = self.setting.rank
        whole: dict[str, Change] = {}
        for site, change in content.change.items():
            A = change.A.new_zeros(rank, change.A.shape[1])
            B = change.B.new_zeros(change.B.shape[0], rank)
            A[content.indices] = change.A
            B[:, content.indices] = change.B
            whole[site] = Change(A, B)
        return Sketched(whole, list(range(rank)))

    def global_assembly(self, state: Whole) -> Assembly:
        return Assembly((Term("global", state.whole),))

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Mine,
        round: int,
    ) -> Plan:
        sketch = self.sketch(offer.whole, self.mask(client, round))
        return [Step(Assembly((Term("sketch", sketch),)))]

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Whole,
        mine: Mine,
        round: int,
    ) -> tuple[Sketched, Mine]:
        chosen = self.mask(client, round)
        start = self.sketch(offer.whole, chosen)
        change: dict[str, Change] = {}
        for site, end in trained[-1].adapter("sketch").items():
            change[site] = Change(end.A - start[site].A, end.B - start[site].B)
        return Sketched(change, chosen), mine

    def personal(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Mine,
    ) -> Assembly:
        return Assembly((Term("global", offer.whole),))

    def mask(self, client: ClientInfo, round: int) -> list[int]:
        """The rank indices that the client trains in the round, ascending."""
        rng = self.setting.rng(round, client.name, "sketch")
        return sorted(torch.randperm(self.setting.rank, generator=rng)[: client.rank].tolist())

    def sketch(self, adapter: Adapter, chosen: Sequence[int]) -> Adapter:
        """The adapter ``B S A`` of the chosen modules alone."""
        stronger = self.setting.rank / len(chosen)
        sketch: Adapter = {}
        for site, factors in select(adapter, chosen).items():
            sketch[site] = replace(factors, scale=factors.scale * stronger)
        return sketch
