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
from fedgrove.adapters.centre import active, centred, plain_gram, reweighed
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
from fedgrove.methods.rule import Arrived, Needs, Outcome, Round

Letter = Literal["A", "B"]


@dataclass(frozen=True, eq=False)
class OneFactor:
    """One factor of each site: A [rank, in] or B [out, rank]."""

    half: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class OwnFactor:
    """The other one, where it trains and stays with the client; None before it has trained."""

    half: dict[str, Tensor] | None = None


@dataclass
class SharedHalf:
    """The mean of one factor; the other stays as each client has it."""

    options: contract.Options
    round: Round
    shared: ClassVar[Letter]
    needs: ClassVar[Needs] = Needs(equal_ranks=True, equal_scales=True)

    @staticmethod
    def mean(
        halves: Sequence[Tensor],
        weights: Sequence[float],
    ) -> Tensor:
        """The weighted sum of one factor of all clients, all [rank, in] or all [out, rank]."""
        if active() is not None:
            return centred(halves, weights).to(halves[0].dtype)
        total = halves[0] * weights[0]
        for half, weight in zip(halves[1:], weights[1:], strict=True):
            total = total + half * weight
        return total

    def site(self, given: Arrived) -> Outcome:
        common = self.mean([_of(each, self.shared) for each in given.factors], given.weights)
        return Outcome(own=[_with(each, self.shared, common) for each in given.factors])


@dataclass
class SharedA(SharedHalf):
    shared = "A"


@dataclass
class SharedB(SharedHalf):
    shared = "B"


@dataclass
class FrozenA(SharedHalf):
    """A is the same everywhere, so that the mean of B is everything."""

    shared = "B"
    needs: ClassVar[Needs] = Needs(equal_ranks=True, equal_scales=True, frozen="A")

    def site(self, given: Arrived) -> Outcome:
        common = self.mean([each.B for each in given.factors], given.weights)
        return Outcome(whole=replace(given.factors[0], B=common))


class Half(Method, Summable):
    """Shares the factor that its rule averages; the other is frozen or private."""

    stale = True
    centres = "values"
    State, Offer, Mine, Sent = OneFactor, OneFactor, OwnFactor, OneFactor
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    Rule: ClassVar[type[SharedHalf]]
    private: ClassVar[Letter | None] = None  # the factor that trains but stays

    def begin(self, clients: Sequence[ClientInfo]) -> OneFactor:
        return OneFactor(_half(self.setting.shared_draw(), self.Rule.shared))

    def offer(
        self,
        state: OneFactor,
        round: int,
        client: ClientInfo,
    ) -> OneFactor:
        return state

    def aggregate(
        self,
        state: OneFactor,
        round: int,
        updates: Sequence[Update[OneFactor]],
    ) -> OneFactor:
        weights = shares(updates, self.options.weights)
        halves = [update.content.half for update in updates]
        weights = reweighed(
            [next(iter(half.values())) for half in halves],
            lambda: plain_gram([list(half.values()) for half in halves]),
            weights,
        )
        common = {}
        for site in self.setting.sites:
            common[site] = self.Rule.mean([half[site] for half in halves], weights)
        return OneFactor(common)

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: OneFactor,
        mine: OwnFactor,
        round: int,
    ) -> tuple[OneFactor, OwnFactor]:
        adapter = trained[-1].adapter("adapter")
        if self.private:
            stays = OwnFactor(_half(adapter, self.private))
        else:
            stays = mine
        return OneFactor(_half(adapter, self.Rule.shared)), stays

    def personal(
        self,
        client: ClientInfo,
        offer: OneFactor,
        mine: OwnFactor,
    ) -> Assembly:
        adapter = self._joined(offer.half, reveal(mine.half))
        kept = self.private or ""
        return Assembly((Term("adapter", adapter, train=self.Rule.shared + kept, kept=kept),))

    def global_assembly(self, state: OneFactor) -> Assembly | None:
        if self.private:
            return None
        return Assembly((Term("adapter", self._joined(state.half, None)),))

    def _joined(
        self,
        shared: Mapping[str, Tensor],
        own: Mapping[str, Tensor] | None,
    ) -> Adapter:
        """The shared factors and the client's own, A [rank, in] or B [out, rank] by site, as one
        adapter.
        """
        adapter = self.setting.shared_draw()
        if self.Rule.shared == "A":
            other: Letter = "B"
        else:
            other = "A"
        for site, factors in adapter.items():
            adapter[site] = _with(factors, self.Rule.shared, shared[site])
            if own is not None:
                adapter[site] = _with(adapter[site], other, own[site])
        return adapter


def _half(adapter: Adapter, letter: Letter) -> dict[str, Tensor]:
    """A [rank, in] or B [out, rank] of every site."""
    return {site: _of(factors, letter) for site, factors in adapter.items()}


def _of(factors: Factors, letter: Letter) -> Tensor:
    """A [rank, in] or B [out, rank]."""
    if letter == "A":
        return factors.A
    return factors.B


def _with(
    factors: Factors,
    letter: Letter,
    value: Tensor,
) -> Factors:
    """The factors with A [rank, in] or B [out, rank] replaced."""
    if letter == "A":
        return replace(factors, A=value)
    return replace(factors, B=value)
