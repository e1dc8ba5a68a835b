"""FedDPA: a global and a local LoRA on every client, weighed for each example when the model is
used.

Source: Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", arXiv 2403.19211.
FedDPA-F trains the global adapter federatedly and a local one afterwards; FedDPA-T trains both in
each round, the local one with the global one frozen and their outputs mixed 0.5 / 0.5, then the
global one alone. In use, an example whose features have mean cosine similarity ``c`` with a few of
the client's own training examples gives the *global* adapter the weight
``w = cap · c`` (not below 0) and the local one ``1 − w``: the direction and the formula of the
official code.

Where we differ: features are the masked mean of the base's last hidden states (the official code
takes a decoder's last token), and the references are drawn once and kept. The last rounds of
FedDPA-F count in the budget and also run in the
0.5 / 0.5 mix; the local adapter starts from the global one. A client without a local adapter
deploys the global one.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term, Weighted
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    State,
    Step,
    Trained,
    Update,
    keep,
    reveal,
    shares,
)


class _DPAOptions(contract.WeightedOptions):
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


@dataclass(frozen=True)
class ByExample(Mix):
    """``w · global + (1 − w) · own`` with ``w = cap · mean cosine`` to the extra ``references``
    [count, hidden].
    """

    cap: float

    linear = False
    needs_features = True

    def weigh(self, at: Junction) -> Sequence[float | Tensor]:
        assert at.features is not None  # the kernel provides them: needs_features
        near = torch.nn.functional.cosine_similarity(
            at.features[:, None, :], at.extras["references"][None], dim=-1
        )
        weight = (self.cap * near.mean(1)).clamp_min(0.0)[:, None, None]
        return [weight if term == "global" else 1 - weight for term in at.terms]


class _FedDPA(Method):
    trains = "A, B of both adapters"
    shares = "A, B of the global"
    keeps = "local adapter, references"
    averages_factors = True
    no_rule = (
        "its server averages the clients' global adapters as fedit does; aggregate those with fedit"
    )
    mixes = (ByExample,)

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"global": self.setting.shared_draw()}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {"global": state["global"]}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        return {**state, "global": mean(adapters, shares(updates, self.options.weights))}

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("global", state["global"]),))

    def reads(self) -> str:
        return "the features of some training examples, which its model keeps"

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        shared = offer["global"] if "global" in offer else mine["global"]
        if "own" not in mine:
            return Assembly((Term("global", shared),))
        return Assembly(
            (Term("global", shared, train=""), Term("own", mine["own"], home="client")),
            ByExample(self.options.cap),
            {"references": Extra(mine["references"], train=False)},
        )

    def _local(self, shared: Adapter, mine: Mine, share: float) -> Generator[Step, Trained, None]:
        """The references, once, then the local adapter beside the frozen global one."""
        if "references" not in mine:
            yield Step(Assembly(), measure="features", count=self.options.references)
        weight = self.options.training_weight
        yield Step(
            Assembly(
                (
                    Term("global", shared, train=""),
                    Term("own", reveal(mine).get("own", shared), home="client"),
                ),
                Weighted({"global": weight, "own": 1 - weight}),
            ),
            share=share,
            stream="local",
        )

    def _kept(self, trained: Sequence[Trained], mine: Mine) -> Mine:
        """What stays after ``_local``."""
        features = next((t.features for t in trained if t.features is not None), None)
        own = next(
            t.adapter("own")
            for t in trained
            if any(term.name == "own" for term in t.assembly.terms)
        )
        references = mine["references"] if features is None else keep(features)
        return {"own": own, "references": references}


class FedDPAF(_FedDPA):
    name = "feddpa-f"
    title = "FedDPA-F"
    paper = "arXiv 2403.19211"
    Options: ClassVar[type[contract.Options]] = DPAFOptions

    @property
    def federated_rounds(self) -> int:
        """Rounds that train the global adapter: at least one."""
        wanted = self.options.local_rounds * self.setting.rounds
        local = max(1, round(wanted)) if wanted else 0
        return max(1, self.setting.rounds - local)

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {**super().begin(clients), "holds": []}  # who has the finished global adapter

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {} if client.name in state["holds"] else {"global": state["global"]}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        if round <= self.federated_rounds:
            return super().aggregate(state, round, updates)
        return {**state, "holds": sorted({*state["holds"], *(update.client for update in updates)})}

    def plan(
        self, client: ClientInfo, offer: Offer, mine: Mine, round: int
    ) -> Generator[Step, Trained, None]:
        if round <= self.federated_rounds:
            yield Step(Assembly((Term("global", offer["global"]),)))
        else:
            yield from self._local(
                offer["global"] if "global" in offer else mine["global"], mine, 1.0
            )

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        if round <= self.federated_rounds:
            return {"adapter": trained[-1].adapter("global")}, mine
        return {}, {"global": trained[-1].adapter("global"), **self._kept(trained, mine)}

    def welcome(self, state: State, client: ClientInfo, probe: Mapping[str, Any] | None) -> Offer:
        return {"global": state["global"]}


class FedDPAT(_FedDPA):
    name = "feddpa-t"
    title = "FedDPA-T"
    paper = "arXiv 2403.19211"
    Options: ClassVar[type[contract.Options]] = DPATOptions

    def plan(
        self, client: ClientInfo, offer: Offer, mine: Mine, round: int
    ) -> Generator[Step, Trained, None]:
        yield from self._local(offer["global"], mine, self.options.local_share)
        yield Step(Assembly((Term("global", offer["global"]),)), share=1 - self.options.local_share)

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        return {"adapter": trained[-1].adapter("global")}, self._kept(trained, mine)
