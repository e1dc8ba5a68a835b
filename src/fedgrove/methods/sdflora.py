"""SDFLoRA: a shared module that is stacked across ranks and recompressed, and a private one trained
beside it.

Source: "SDFLoRA: Selective Dual-Module LoRA for Federated Fine-tuning with Heterogeneous Clients",
arXiv 2601.11219.
``W0 + s B A + s B_own A_own``: the server stacks the clients' shared modules with their weights, so
that the product is exactly ``Σ p_i s_i B_i A_i`` whatever the ranks, and gives each client the best
approximation of its own rank (SVD). The private module never travels. Noise for differential
privacy, where wanted, falls on the shared module alone. With ``fusion = "sigmoid"`` the two are
mixed as in the authors' code, at each site by two trained weights ``sigmoid(w)`` that stay with the
client and start at .67 (shared) and .57 (private); else (ours) they add up.

Where we differ: the stack is recompressed to R once and a client gets its first ``r_i`` directions,
which is the same.
``dp_noise`` is drawn from the job's seed, so that runs repeat: it shows what such noise costs, and
protects nobody from someone who knows the seed; no privacy budget is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, fresh
from fedgrove.adapters.algebra import rescale, truncate
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term
from fedgrove.adapters.lowrank import product_mean
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Trained,
    Update,
    shares,
)
from fedgrove.methods.records import OneAdapter, Whole

#: Where the authors' code starts the two weights, before the sigmoid.
FUSION_STARTS = {"shared": 0.7, "own": 0.3}


class SDFOptions(contract.WeightedOptions):
    """The keys of ``[method]`` for SDFLoRA."""

    fusion: Literal["sum", "sigmoid"] = Field(
        "sum",
        description="How the two modules' outputs meet: they add up, or are weighed at each layer "
        "by two trained sigmoids, as in the authors' code.",
    )
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


@dataclass(frozen=True)
class Sigmoids(Mix):
    """Each term with the weight ``sigmoid(w)``, w being the extra ``fusion.<term>.<site>``."""

    def weigh(self, at: Junction) -> Sequence[float | Tensor]:
        """As in Mix, a scalar ``[]`` each."""
        weights: list[Tensor] = []
        for term in at.terms:
            logit = at.extras[_weight(term, at.site.name)]
            weights.append(torch.sigmoid(logit))
        return weights


@dataclass(frozen=True, eq=False)
class Shared:
    """The shared module at a client's rank, as it goes down."""

    shared: Adapter


@dataclass(frozen=True, eq=False)
class Private:
    """What stays with a client: its module, and the weights before the sigmoid, scalars by name."""

    own: Adapter | None = None
    fusion: dict[str, Tensor] = field(default_factory=dict)


class SDFLoRA(Method):
    name = "sdflora"
    title = "SDFLoRA"
    paper = "arXiv 2601.11219"
    trains = "A, B of both modules"
    shares = "A, B of the shared"
    keeps = "private module"
    ranks = "mixed"
    centres = "weights"
    State, Offer, Mine, Sent = Whole, Shared, Private, OneAdapter
    Options: ClassVar[type[contract.Options]] = SDFOptions
    no_rule = (
        "its server recompresses the clients' shared adapters as flexlora does; aggregate "
        "those with flexlora"
    )

    # ------------------------------------------------------------------ server
    def begin(self, clients: Sequence[ClientInfo]) -> Whole:
        return Whole(self.setting.shared_draw())

    def offer(
        self,
        state: Whole,
        round: int,
        client: ClientInfo,
    ) -> Shared:
        first = truncate(state.whole, client.rank)
        return Shared(rescale(first, self.setting.scale(client.rank)))

    def aggregate(
        self,
        state: Whole,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> Whole:
        adapters = [update.content.adapter for update in updates]
        rank = self.setting.rank
        weights = shares(updates, self.options.weights)
        return Whole(product_mean(adapters, weights, rank, self.setting.scale(rank)))

    def global_assembly(self, state: Whole) -> Assembly:
        return Assembly((Term("shared", state.whole),))

    # ------------------------------------------------------------------ client
    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Shared,
        mine: Private,
        round: int,
    ) -> tuple[OneAdapter, Private]:
        last = trained[-1]
        after = last.adapter("shared")
        if self.options.dp_clip:
            clip = self.options.dp_clip
            noise = self.setting.rng(round, client.name, "noise")
            after = clipped(
                offer.shared,
                after,
                clip,
                self.options.dp_noise * clip,
                noise,
            )
        fusion = {name: last.extra(name) for name in self._starts()}
        return OneAdapter(after), Private(last.adapter("own"), fusion)

    def personal(
        self,
        client: ClientInfo,
        offer: Shared,
        mine: Private,
    ) -> Assembly:
        own = mine.own or self._fresh(client)
        terms = (Term("shared", offer.shared), Term("own", own, home="client"))
        if self.options.fusion == "sum":
            return Assembly(terms)
        values = mine.fusion or self._starts()
        return Assembly(
            terms,
            Sigmoids(),
            {name: Extra(value) for name, value in values.items()},
        )

    def _starts(self) -> dict[str, Tensor]:
        """The weights of a client that has trained none, scalars ``[]``; empty where the terms add
        up.
        """
        starts: dict[str, Tensor] = {}
        if self.options.fusion == "sum":
            return starts
        for site in self.setting.sites:
            for term, start in FUSION_STARTS.items():
                name = _weight(term, site)
                starts[name] = torch.tensor(start)
        return starts

    def _fresh(self, client: ClientInfo) -> Adapter:
        rank = self.options.private_rank or client.rank
        # The shared module's scale, whatever the private rank: one learning rate fits both.
        return fresh(
            self.setting.sites,
            rank,
            self.setting.scale(client.rank),
            self.setting.rng("private"),
        )


def _weight(term: str, site: str) -> str:
    return f"fusion.{term}.{site}"


def clipped(
    before: Adapter,
    after: Adapter,
    clip: float,
    sigma: float,
    rng: torch.Generator,
) -> Adapter:
    """``before`` plus the change of all its numbers, of norm at most ``clip``, plus noise of
    deviation ``sigma``.
    """
    norm = _distance(before, after)
    shrink = 1.0
    if norm > clip:
        shrink = clip / norm

    def moved(
        old: Float[Tensor, "rows columns"],
        new: Float[Tensor, "rows columns"],
    ) -> Float[Tensor, "rows columns"]:
        change = (new.double() - old.double()) * shrink
        if sigma:
            change = change + sigma * torch.randn(change.shape, generator=rng, dtype=torch.float64)
        return (old.double() + change).to(new.dtype)

    result: Adapter = {}
    for site, new in after.items():
        A = moved(before[site].A, new.A)
        B = moved(before[site].B, new.B)
        result[site] = Factors(A, B, new.scale)
    return result


def _distance(before: Adapter, after: Adapter) -> float:
    """The norm of the change of all numbers, in float64."""
    changes: list[Tensor] = []
    for site, new in after.items():
        old = before[site]
        of_A = new.A.double() - old.A.double()
        of_B = new.B.double() - old.B.double()
        changes += [of_A.flatten(), of_B.flatten()]
    return float(torch.cat(changes).norm())
