"""What FFA-LoRA, FedSA-LoRA and FedVLM share: one half of each factor pair travels.

The three share one shape: a factor that is averaged, and the other that is frozen at the shared
draw or stays with the client. Because the shared ``A`` is drawn from the job's seed, a frozen or a
starting ``A`` costs no message.

DoRA's magnitudes (``lora.dora``, ours) go where B goes: both belong to a layer's outputs. They travel
and are kept as their change from the base's own norms, which all know, so that compression rounds
the change alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Dora, Factors
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
#: which letters of a term train, stay or travel with a factor
WITH: Mapping[Letter, str] = {"A": "A", "B": "BM"}


@dataclass(frozen=True, eq=False)
class OneFactor:
    """One factor of each site: A [rank, in] or B [out, rank]; with B the change of DoRA's
    magnitudes [out], where there are any.
    """

    half: dict[str, Tensor]
    change: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class OwnFactor:
    """The other one, where it trains and stays with the client; None before it has trained."""

    half: dict[str, Tensor] | None = None
    change: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class SharedHalf:
    """The mean of one factor; the other stays as each client has it."""

    options: contract.Options
    round: Round
    shared: ClassVar[Letter]
    needs: ClassVar[Needs] = Needs(equal_ranks=True, equal_scales=True, magnitudes=True)

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
        return Outcome(own=[self.common(given, each) for each in given.factors])

    def common(self, given: Arrived, own: Factors) -> Factors:
        """A client's own factors with the mean of what is shared."""

        def middle(letter: str, value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
            if letter not in WITH[self.shared]:
                return value
            return self.mean([each.tensors[letter] for each in given.factors], given.weights)

        return own.each(middle)


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
    needs: ClassVar[Needs] = Needs(
        equal_ranks=True,
        equal_scales=True,
        frozen="A",
        magnitudes=True,
    )

    def site(self, given: Arrived) -> Outcome:
        return Outcome(whole=self.common(given, given.factors[0]))


class Half(Method, Summable):
    """Shares the factor that its rule averages; the other is frozen or private."""

    stale = True
    centres = "values"
    State, Offer, Mine, Sent = OneFactor, OneFactor, OwnFactor, OneFactor
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    Rule: ClassVar[type[SharedHalf]]
    private: ClassVar[Letter | None] = None  # the factor that trains but stays

    def begin(self, clients: Sequence[ClientInfo]) -> OneFactor:
        drawn = self.setting.shared_draw()
        return OneFactor(
            _half(drawn, self.Rule.shared),
            self._change(drawn, self.Rule.shared),
        )

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
        changes = [update.content.change for update in updates]
        return OneFactor(
            self._mean(halves, weights),
            self._mean(changes, weights),
        )

    def _mean(
        self,
        tables: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
    ) -> dict[str, Tensor]:
        """The mean of each site's tensor [any shape] over the clients' tables of them."""
        common = {}
        for site in self.setting.sites:
            if site in tables[0]:
                common[site] = self.Rule.mean([table[site] for table in tables], weights)
        return common

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
            stays = OwnFactor(
                _half(adapter, self.private),
                self._change(adapter, self.private),
            )
        else:
            stays = mine
        sent = OneFactor(
            _half(adapter, self.Rule.shared),
            self._change(adapter, self.Rule.shared),
        )
        return sent, stays

    def personal(
        self,
        client: ClientInfo,
        offer: OneFactor,
        mine: OwnFactor,
    ) -> Assembly:
        adapter = self._joined(offer.half, reveal(mine.half))
        self._magnify(adapter, {**offer.change, **reveal(mine.change)})
        kept = ""
        if self.private:
            kept = WITH[self.private]
        train = WITH[self.Rule.shared] + kept
        return Assembly((Term("adapter", adapter, train=train, kept=kept),))

    def global_assembly(self, state: OneFactor) -> Assembly | None:
        if self.private:
            return None
        adapter = self._joined(state.half, None)
        self._magnify(adapter, state.change)
        return Assembly((Term("adapter", adapter),))

    def _change(self, adapter: Adapter, letter: Letter) -> dict[str, Tensor]:
        """The change [out] of each site's magnitudes, where they go with this factor; {} without
        DoRA.
        """
        norms = self.setting.norms
        if norms is None or "M" not in WITH[letter]:
            return {}
        return {site: each.tensors["M"] - norms[site] for site, each in adapter.items()}

    def _magnify(self, adapter: Adapter, change: Mapping[str, Tensor]) -> None:
        """Put changed magnitudes, [out] by site, into an adapter, in place."""
        for site, more in change.items():
            factors = adapter[site]
            if isinstance(factors, Dora):
                adapter[site] = replace(factors, M=factors.M + more)

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
