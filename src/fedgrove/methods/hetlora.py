"""HETLoRA: clients of different rank share the first rows; they prune their own rank, norms weigh
the mean.

Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
arXiv 2401.06432. Client i trains the first ``r_i`` modules of the global adapter with ``lam ||B[:,
g r:]|| ||A[g r:, :]||`` added to the loss at each site (g is ``gamma``); if that tail has shrunk
over the round, ``r_i`` becomes ``max(r_min, floor(g r_i))`` from then on. The server pads with
zeros and averages with weights ``||B_i A_i|| / sum ||B_j A_j||``.

Where we differ: the norms are taken over all sites together, the tail is summed over the sites and
begins at
``r_min`` at the earliest (what cannot be pruned is not penalised). A module that no client of the
round holds keeps its last value; the padding would set both its factors to zero, from where no
gradient moves them. ``variant = "reduced"`` is what most comparisons run under this name: pad, mean
by ``weights``, truncate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import mean, norm, pad, rescale, truncate
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.ground.errors import JobError
from fedgrove.ground.plain import Plain
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Live,
    Method,
    Mine,
    Plan,
    Step,
    Trained,
    Update,
    WeightedOptions,
    shares,
)
from fedgrove.methods.records import OneAdapter, Whole
from fedgrove.methods.rule import (
    Arrivals,
    Arrived,
    Needs,
    Outcome,
    Round,
    ServerRule,
    combine,
    prepared,
)


class HetOptions(WeightedOptions):
    """HETLoRA's keys."""

    variant: Literal["full", "reduced"] = Field(
        "full",
        description='"full" is the paper\'s; "reduced" has no penalty and no pruning and averages '
        "by `weights`, which the full one does not read.",
    )
    gamma: float = Field(0.99, gt=0, lt=1, description="Share of the rank that survives a pruning.")
    lam: float = Field(
        0.01, ge=0, description="Weight of the penalty on the tail that may be pruned."
    )
    r_min: int = Field(1, ge=1, description="No client's rank is pruned below this.")
    rescale: Literal["B"] | None = Field(
        None,
        description='"B" folds different scales (lora.scaling = "client" with different ranks) '
        "into B before the mean of the factors; not set: such a job is refused.",
    )


@dataclass
class PaddedMean:
    """The mean of zero-padded factors; a client gets the first rows that it has."""

    options: HetOptions
    round: Round
    squares: list[list[float]] = field(default_factory=list)  # by site and client, of the norms
    needs: ClassVar[Needs] = Needs(equal_scales=True, previous=True, options=("variant",))

    @property
    def measure(self) -> str:
        if self.options.variant == "reduced":
            return ""
        return "the norms of their updates (variant=reduced takes --weights)"

    def look(self, given: Arrived) -> None:
        if self.measure:
            norms = [norm(each)[given.name] for each in given.adapters]
            self.squares.append([value * value for value in norms])

    def weights(self, given: Sequence[float]) -> list[float]:
        if not self.measure:
            return list(given)
        norms = [math.sqrt(math.fsum(squares)) for squares in zip(*self.squares, strict=True)]
        total = math.fsum(norms)
        if total > 0:
            return [each / total for each in norms]
        return [1.0 / len(norms)] * len(norms)

    def site(self, given: Arrived) -> Outcome:
        adapters = given.adapters
        if self.options.rescale == "B":
            adapters = [rescale(each, given.scale) for each in adapters]
        name = given.name
        most = max(each.rank for each in given.factors)
        padded = [pad(each, most) for each in adapters]
        whole = mean(padded, given.weights)[name]
        old = given.previous
        if old is not None and old.rank > most:  # what no client of the round holds stays
            A = torch.cat([whole.A, old.A[most:]])
            B = torch.cat([whole.B, old.B[:, most:]], 1)
            whole = replace(whole, A=A, B=B)
        own: list[Factors] = []
        for each in given.factors:
            shorter = truncate({name: whole}, each.rank)
            own.append(shorter[name])
        return Outcome(whole=whole, own=own)


@dataclass(frozen=True, eq=False)
class WholeAndRanks(Whole):
    """The server's state: the global adapter, and each client's rank so far."""

    ranks: dict[str, int]


class HETLoRA(Method):
    name = "hetlora"
    title = "HETLoRA"
    paper = "arXiv 2401.06432"
    trains = "first r_i of A, B"
    shares = "first r_i of A, B"
    keeps = "nothing"
    ranks = "mixed"
    centres = "values"
    State, Offer, Sent = WholeAndRanks, Whole, OneAdapter
    Options: ClassVar[type[contract.Options]] = HetOptions
    Rule: ClassVar[type[ServerRule]] = PaddedMean

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        scales = sorted({self.setting.scale(client.rank) for client in clients})
        if len(scales) > 1 and self.options.rescale is None:
            raise JobError(
                f"HETLoRA averages A and B, which is undefined for the clients' scales {scales}; "
                'set lora.scaling = "global" or method.rescale = "B".'
            )

    def unmeasured(self) -> str:
        if self.options.variant == "full":
            return "a client may prune its own rank while it trains"
        return ""

    def begin(self, clients: Sequence[ClientInfo]) -> WholeAndRanks:
        ranks = {client.name: client.rank for client in clients}
        return WholeAndRanks(self.setting.shared_draw(), ranks)

    def offer(
        self,
        state: WholeAndRanks,
        round: int,
        client: ClientInfo,
    ) -> Whole:
        first = truncate(state.whole, state.ranks.get(client.name, client.rank))
        # A pruned client keeps the scale of the rank that it began with.
        return Whole(rescale(first, self.setting.scale(client.rank)))

    def aggregate(
        self,
        state: WholeAndRanks,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> WholeAndRanks:
        arrivals = self._arrivals(updates, state.whole)
        ranks = dict(state.ranks)
        for update in updates:
            ranks[update.client] = rank_of(update.content.adapter)
        return WholeAndRanks(combine(self._rule(), arrivals).whole, ranks)

    def weights(self, updates: Sequence[Update[OneAdapter]]) -> list[float]:
        arrivals = self._arrivals(updates)
        return list(prepared(self._rule(), arrivals, arrivals.weights))

    def _rule(self) -> ServerRule:
        return self.Rule(self.options, Round(self.setting.sites))

    def _arrivals(
        self,
        updates: Sequence[Update[OneAdapter]],
        previous: Adapter | None = None,
    ) -> Arrivals:
        adapters = [update.content.adapter for update in updates]
        weights = shares(updates, self.options.weights)
        return Arrivals(self.setting, adapters, weights, previous=previous)

    def global_assembly(self, state: WholeAndRanks) -> Assembly:
        return Assembly((Term("global", state.whole),))

    def artefacts(self, state: WholeAndRanks) -> Plain:
        """``ranks.json``: each client's rank, as pruned so far."""
        return {"ranks.json": dict(state.ranks)}

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Mine,
        round: int,
    ) -> Plan:
        penalty = self.tail_penalty(rank_of(offer.whole))
        return [Step(self.personal(client, offer, mine), penalty=penalty)]

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Whole,
        mine: Mine,
        round: int,
    ) -> tuple[OneAdapter, Mine]:
        adapter = trained[-1].adapter("global")
        kept = self.kept(rank_of(adapter))
        if self.options.variant == "full" and kept < rank_of(adapter):
            before = float(tail_size(offer.whole, kept))
            after = float(tail_size(adapter, kept))
            if after < before:
                adapter = truncate(adapter, kept)
        return OneAdapter(adapter), mine

    def personal(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Mine,
    ) -> Assembly:
        return Assembly((Term("global", offer.whole),))

    def kept(self, rank: int) -> int:
        """The rank that a pruning leaves of ``rank``."""
        # In tenths of a millionth: 0.7 * 10 is 7, though its floating-point product may be less.
        share = math.floor(self.options.gamma * rank + 1e-7)
        least = max(self.options.r_min, share)
        return min(rank, least)

    def tail_penalty(self, rank: int) -> Callable[[Live], Tensor] | None:
        """What is added to the loss of a client of rank ``rank``, a scalar ``[]``; None where
        nothing can be pruned.
        """
        kept = self.kept(rank)
        lam = self.options.lam
        if self.options.variant == "reduced" or kept == rank or lam == 0:
            return None
        return lambda live: lam * tail_size(live.terms["global"], kept)


def tail_size(adapter: Adapter, kept: int) -> Tensor:
    """``||B[:, kept:]|| ||A[kept:, :]||`` summed over the sites, [] (a scalar)."""
    sizes: list[Tensor] = []
    for factors in adapter.values():
        columns = factors.B[:, kept:]
        rows = factors.A[kept:]
        sizes.append(columns.norm() * rows.norm())
    return torch.stack(sizes).sum()


def rank_of(adapter: Adapter) -> int:
    return next(iter(adapter.values())).rank
