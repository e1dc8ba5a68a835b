"""FedDPA: a global and a local LoRA on every client, weighed for each example when the model is
used.

Source: Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", arXiv 2403.19211.
FedDPA-F trains the global adapter federatedly and a local one afterwards; FedDPA-T trains both in
each round, the local one with the global one frozen and their outputs mixed 0.5 / 0.5, then the
global one alone. In use, an example whose features have mean cosine similarity ``c`` with a few of
the client's own training examples gives the *global* adapter the weight
``w = cap · c`` (not below 0) and the local one ``1 − w``: the direction and the formula of the
official code.

Two habits of the official code are options: ``features = "local"`` reads features from the base
with the client's *local* adapter, and its references anew after each local training; FedDPA-T with
``renew = true`` trains the global adapter alone in round 1 and then starts each local one afresh.

Where we differ: features are the masked mean of the base's last hidden states (the official code
takes a decoder's last token), and the references are drawn once and kept. The last rounds of
FedDPA-F count in the budget and also run in the 0.5 / 0.5 mix; the local adapter starts from the
global one. A client without a local adapter deploys the global one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term, Weighted
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Probed,
    Step,
    Trained,
    Update,
    keep,
    reveal,
    shares,
)
from fedgrove.methods.records import OneAdapter, Whole


class _DPAOptions(contract.WeightedOptions):
    features: Literal["base", "local"] = Field(
        "base",
        description="What examples are compared by: the features of the base, or those of the base "
        "with the client's local adapter, as in the official code.",
    )
    references: int = Field(
        5, ge=1, description="Local training examples that an example is compared with."
    )
    cap: float = Field(
        0.5, ge=0, le=1, description="Largest weight of the global adapter when the model is used."
    )
    training_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the frozen global adapter while the local one trains.",
    )


class DPAFOptions(_DPAOptions):
    local_rounds: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Share of run.rounds, the last ones, that train the local adapter alone and "
        "send nothing; at least "
        "one round unless 0.",
    )


class DPATOptions(_DPAOptions):
    local_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of a round's local budget that trains the local adapter.",
    )
    renew: bool = Field(
        False,
        description="Train the global adapter alone in round 1; a local adapter starts afresh, from "
        "a random A and B = 0, when its client trains it first. As the official code does.",
    )


@dataclass(frozen=True)
class ByExample(Mix):
    """``w · global + (1 − w) · own`` with ``w = cap · mean cosine`` to the extra ``references``
    [count, hidden].
    """

    cap: float

    linear = False
    needs_features = True

    def weigh(self, at: Junction) -> Sequence[float | Tensor]:
        """As in Mix, each [batch, 1, 1]."""
        assert at.features is not None  # the kernel provides them: needs_features
        weight = self.cap * mean_cosine(at.features, at.extras["references"])
        shared = weight.clamp_min(0.0)[:, None, None]
        named = {"global": shared, "own": 1 - shared}
        return [named[term] for term in at.terms]


@dataclass(frozen=True)
class ByLocalExample(ByExample):
    """The same with features of the base and the client's local adapter."""

    features_with = ("own",)


def mean_cosine(
    features: Float[Tensor, "b hidden"],
    references: Float[Tensor, "count hidden"],
) -> Float[Tensor, " b"]:
    """Each example's mean cosine similarity with the references."""
    near = torch.nn.functional.cosine_similarity(
        features[:, None, :],
        references[None],
        dim=-1,
    )
    return near.mean(1)


@dataclass(frozen=True, eq=False)
class Down:
    """The global adapter; None to who holds the finished one."""

    whole: Adapter | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays with a client: its local adapter, the features of its references [count, hidden],
    and, of FedDPA-F, the finished global adapter.
    """

    own: Adapter | None = None
    references: Tensor | None = None
    whole: Adapter | None = None


class _FedDPA(Method):
    trains = "A, B of both adapters"
    shares = "A, B of the global"
    keeps = "local adapter, references"
    averages_factors = True
    no_rule = (
        "its server averages the clients' global adapters as fedit does; aggregate those with fedit"
    )
    mixes = (ByExample, ByLocalExample)
    centres = "values"
    Offer, Mine, Sent = Down, Kept, OneAdapter

    def reads(self) -> str:
        return "the features of some training examples, which its model keeps"

    def personal(
        self,
        client: ClientInfo,
        offer: Down,
        mine: Kept,
    ) -> Assembly:
        shared = _shared(offer, mine)
        if mine.own is None or mine.references is None:
            return Assembly((Term("global", shared),))
        terms = (Term("global", shared, train=""), Term("own", mine.own, home="client"))
        kind = ByExample
        if self.options.features == "local":
            kind = ByLocalExample
        references = {"references": Extra(mine.references, train=False)}
        return Assembly(terms, kind(self.options.cap), references)

    def _mean(self, updates: Sequence[Update[OneAdapter]]) -> Adapter:
        """FedIT's mean of the global adapters."""
        adapters = [update.content.adapter for update in updates]
        return mean(adapters, shares(updates, self.options.weights))

    def _local(
        self,
        shared: Adapter,
        start: Adapter | None,
        mine: Kept,
        share: float,
    ) -> Generator[Step, Trained, None]:
        """The local adapter beside the frozen global one, and the references: once before it, or
        after each training of the adapter that they are read with.
        """
        look = Step(Assembly(), measure="features", count=self.options.references)
        by_base = self.options.features == "base"
        if by_base and mine.references is None:
            yield look
        terms = (Term("global", shared, train=""), Term("own", start or shared, home="client"))
        weight = self.options.training_weight
        mix = Weighted({"global": weight, "own": 1 - weight})
        trained = yield Step(Assembly(terms, mix), share=share, stream="local")
        if not by_base:
            alone = Term("own", reveal(trained.adapter("own")), train="", home="client")
            yield replace(look, assembly=Assembly((alone,)), stream="references")

    def _kept(self, trained: Sequence[Trained], mine: Kept) -> Kept:
        """What stays after ``_local``, or after a round without it."""
        local = [each.adapter("own") for each in trained if _trains_own(each)]
        if not local:
            return mine
        features = [each.features for each in trained if each.features is not None]
        references = mine.references
        if features:
            references = keep(features[0])
        return replace(mine, own=local[0], references=references)


def _shared(offer: Down, mine: Kept) -> Adapter:
    """The global adapter, as it came down now or as it is held."""
    found = offer.whole or mine.whole
    assert found is not None  # who holds none is offered it
    return found


def _trains_own(trained: Trained) -> bool:
    return any(term.name == "own" and term.train for term in trained.assembly.terms)


@dataclass(frozen=True, eq=False)
class DPAFState:
    """The global adapter, and who has the finished one."""

    whole: Adapter
    holds: list[str] = field(default_factory=list)


class FedDPAF(_FedDPA):
    name = "feddpa-f"
    title = "FedDPA-F"
    laid_out = ("federated_rounds",)
    paper = "arXiv 2403.19211"
    State = DPAFState
    Options: ClassVar[type[contract.Options]] = DPAFOptions

    @property
    def federated_rounds(self) -> int:
        """Rounds that train the global adapter: at least one."""
        wanted = self.options.local_rounds * self.setting.rounds
        local = 0
        if wanted:
            local = max(1, round(wanted))
        return max(1, self.setting.rounds - local)

    @property
    def complete_from(self) -> int:
        return self.federated_rounds + 1

    def begin(self, clients: Sequence[ClientInfo]) -> DPAFState:
        return DPAFState(self.setting.shared_draw())

    def offer(
        self,
        state: DPAFState,
        round: int,
        client: ClientInfo,
    ) -> Down:
        if client.name in state.holds:
            return Down()
        return Down(state.whole)

    def aggregate(
        self,
        state: DPAFState,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> DPAFState:
        if round <= self.federated_rounds:
            return replace(state, whole=self._mean(updates))
        came = [update.client for update in updates]
        return replace(state, holds=sorted({*state.holds, *came}))

    def global_assembly(self, state: DPAFState) -> Assembly:
        return Assembly((Term("global", state.whole),))

    def plan(
        self,
        client: ClientInfo,
        offer: Down,
        mine: Kept,
        round: int,
    ) -> Generator[Step, Trained, None]:
        shared = _shared(offer, mine)
        if round <= self.federated_rounds:
            yield Step(Assembly((Term("global", shared),)))
            return
        yield from self._local(shared, reveal(mine.own), mine, 1.0)

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Down,
        mine: Kept,
        round: int,
    ) -> tuple[OneAdapter, Kept]:
        if round <= self.federated_rounds:
            return OneAdapter(trained[-1].adapter("global")), mine
        kept = replace(self._kept(trained, mine), whole=_shared(offer, mine))
        return OneAdapter(), kept

    def welcome(
        self,
        state: DPAFState,
        client: ClientInfo,
        probe: Probed | None,
    ) -> Down:
        return Down(state.whole)


class FedDPAT(_FedDPA):
    name = "feddpa-t"
    title = "FedDPA-T"
    paper = "arXiv 2403.19211"
    State = Whole
    Options: ClassVar[type[contract.Options]] = DPATOptions

    def begin(self, clients: Sequence[ClientInfo]) -> Whole:
        return Whole(self.setting.shared_draw())

    def offer(
        self,
        state: Whole,
        round: int,
        client: ClientInfo,
    ) -> Down:
        return Down(state.whole)

    def aggregate(
        self,
        state: Whole,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> Whole:
        return Whole(self._mean(updates))

    def global_assembly(self, state: Whole) -> Assembly:
        return Assembly((Term("global", state.whole),))

    def plan(
        self,
        client: ClientInfo,
        offer: Down,
        mine: Kept,
        round: int,
    ) -> Generator[Step, Trained, None]:
        shared, start = _shared(offer, mine), reveal(mine.own)
        if self.options.renew and round == 1:
            yield Step(Assembly((Term("global", shared),)))
            return
        if self.options.renew and start is None:
            start = self.setting.shared_draw(purpose="local")
        yield from self._local(shared, start, mine, self.options.local_share)
        yield Step(Assembly((Term("global", shared),)), share=1 - self.options.local_share)

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Down,
        mine: Kept,
        round: int,
    ) -> tuple[OneAdapter, Kept]:
        return OneAdapter(trained[-1].adapter("global")), self._kept(trained, mine)
