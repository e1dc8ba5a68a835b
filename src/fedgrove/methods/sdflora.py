"""SDFLoRA: a shared module that is stacked across ranks and recompressed, and a private one trained
beside it.

Source: "SDFLoRA: Selective Dual-Module LoRA for Federated Fine-tuning with Heterogeneous Clients",
arXiv 2601.11219.
``W0 + s B A + s B_own A_own``: the server stacks the clients' shared modules with their weights, so
that the product is exactly ``Σ p_i s_i B_i A_i`` whatever the ranks, and gives each client the best
approximation of its own rank (SVD). The private module never travels. Noise for differential
privacy, where wanted, falls on the shared module alone.

Where we differ: the stack is recompressed to R once and a client gets its first ``r_i`` directions,
which is the same.
``dp_noise`` is drawn from the job's seed, so that runs repeat: it shows what such noise costs, and
protects nobody from someone who knows the seed; no privacy budget is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, fresh
from fedgrove.adapters.algebra import rescale, truncate
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.adapters.lowrank import product_mean
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


class SDFOptions(contract.WeightedOptions):
    private_rank: int | None = Field(
        None,
        ge=1,
        description="Rank of the private module. Not set: the client's own rank.",
        examples=[4],
    )
    dp_clip: float = Field(
        0.0,
        ge=0,
        description="Largest norm of what a client changes in the shared module in a round; 0: no "
        "limit.",
    )
    dp_noise: float = Field(
        0.0,
        ge=0,
        description="Standard deviation of the noise on each number of the change, in units of "
        "dp_clip.",
    )

    @model_validator(mode="after")
    def _agree(self) -> SDFOptions:
        if self.dp_noise and not self.dp_clip:
            raise ValueError(
                "method.dp_noise needs a limit that it is measured in; set method.dp_clip above 0."
            )
        return self


class SDFLoRA(Method):
    name = "sdflora"
    title = "SDFLoRA"
    paper = "arXiv 2601.11219"
    trains = "A, B of both modules"
    shares = "A, B of the shared"
    keeps = "private module"
    ranks = "mixed"
    Options: ClassVar[type[contract.Options]] = SDFOptions
    no_rule = (
        "its server recompresses the clients' shared adapters as flexlora does; aggregate "
        "those with flexlora"
    )

    # ------------------------------------------------------------------ server
    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"global": self.setting.shared_draw()}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {
            "shared": rescale(
                truncate(state["global"], client.rank), self.setting.scale(client.rank)
            )
        }

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        rank = self.setting.rank
        weights = shares(updates, self.options.weights)
        return {"global": product_mean(adapters, weights, rank, self.setting.scale(rank))}

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("shared", state["global"]),))

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        after = trained[-1].adapter("shared")
        if self.options.dp_clip:
            clip = self.options.dp_clip
            noise = self.setting.rng(round, client.name, "noise")
            after = clipped(offer["shared"], after, clip, self.options.dp_noise * clip, noise)
        return {"adapter": after}, {"own": trained[-1].adapter("own")}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        own = mine["own"] if "own" in mine else self._fresh(client)
        return Assembly((Term("shared", offer["shared"]), Term("own", own, home="client")))

    def _fresh(self, client: ClientInfo) -> Adapter:
        rank = self.options.private_rank or client.rank
        # The shared module's scale, whatever the private rank: one learning rate fits both.
        return fresh(
            self.setting.sites, rank, self.setting.scale(client.rank), self.setting.rng("private")
        )


def clipped(
    before: Adapter, after: Adapter, clip: float, sigma: float, rng: torch.Generator
) -> Adapter:
    """``before`` plus the change of all its numbers, of norm at most ``clip``, plus noise of
    deviation ``sigma``.
    """
    changes = [c for site in after for c in _change(before[site], after[site])]
    norm = float(torch.cat([change.flatten() for change in changes]).norm())
    shrink = min(1.0, clip / norm) if norm else 1.0

    def moved(old: Tensor, new: Tensor) -> Tensor:
        change = (new.double() - old.double()) * shrink
        if sigma:
            change = change + sigma * torch.randn(change.shape, generator=rng, dtype=torch.float64)
        return (old.double() + change).to(new.dtype)

    return {
        site: Factors(moved(before[site].A, new.A), moved(before[site].B, new.B), new.scale)
        for site, new in after.items()
    }


def _change(before: Factors, after: Factors) -> tuple[Tensor, Tensor]:
    return after.A.double() - before.A.double(), after.B.double() - before.B.double()
