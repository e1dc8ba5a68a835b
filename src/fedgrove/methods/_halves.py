"""What FFA-LoRA, FedSA-LoRA and FedVLM share: one half of each factor pair travels.

The three share one shape: a factor that is averaged, and the other that is frozen at the shared
draw or stays with the client. Because the shared ``A`` is drawn from the job's seed, a frozen or a
starting ``A`` costs no message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Trained,
    Update,
    reveal,
    shares,
)
from fedgrove.methods.protocols import Summable

Letter = Literal["A", "B"]


@dataclass(frozen=True, eq=False)
class OneFactor:
    """One factor of each site: A [rank, in] or B [out, rank]."""

    half: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class OwnFactor:
    """The other one, where it trains and stays with the client; None before it has trained."""

    half: dict[str, Tensor] | None = None


class Half(Method, Summable):
    """Shares one factor (``shared``); the other is frozen or private."""

    stale = True
    State, Offer, Mine, Sent = OneFactor, OneFactor, OwnFactor, OneFactor
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    shared: ClassVar[Letter]
    private: ClassVar[Letter | None] = None  # the factor that trains but stays

    def begin(self, clients: Sequence[ClientInfo]) -> OneFactor:
        return OneFactor(_half(self.setting.shared_draw(), self.shared))

    def offer(self, state: OneFactor, round: int, client: ClientInfo) -> OneFactor:
        return state

    def aggregate(
        self, state: OneFactor, round: int, updates: Sequence[Update[OneFactor]]
    ) -> OneFactor:
        weights = shares(updates, self.options.weights)
        halves = [update.content.half for update in updates]
        means = {
            site: _weighted([half[site] for half in halves], weights) for site in self.setting.sites
        }
        return OneFactor(means)

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: OneFactor,
        mine: OwnFactor,
        round: int,
    ) -> tuple[OneFactor, OwnFactor]:
        adapter = trained[-1].adapter("adapter")
        stays = OwnFactor(_half(adapter, self.private)) if self.private else mine
        return OneFactor(_half(adapter, self.shared)), stays

    def personal(self, client: ClientInfo, offer: OneFactor, mine: OwnFactor) -> Assembly:
        adapter = self._joined(offer.half, reveal(mine.half))
        kept = self.private or ""
        return Assembly((Term("adapter", adapter, train=self.shared + kept, kept=kept),))

    def global_assembly(self, state: OneFactor) -> Assembly | None:
        if self.private:
            return None
        return Assembly((Term("adapter", self._joined(state.half, None)),))

    def _joined(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor] | None) -> Adapter:
        adapter = self.setting.shared_draw()
        other: Letter = "B" if self.shared == "A" else "A"
        for site, factors in adapter.items():
            adapter[site] = _with(factors, self.shared, shared[site])
            if own is not None:
                adapter[site] = _with(adapter[site], other, own[site])
        return adapter


def _half(adapter: Adapter, letter: Letter) -> dict[str, Tensor]:
    return {site: f.A if letter == "A" else f.B for site, f in adapter.items()}


def _with(factors: Factors, letter: Letter, value: Tensor) -> Factors:
    """The factors with A [rank, in] or B [out, rank] replaced."""
    return replace(factors, A=value) if letter == "A" else replace(factors, B=value)


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of tensors of one shape."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total
