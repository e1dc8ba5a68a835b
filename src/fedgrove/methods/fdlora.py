"""FDLoRA: a global LoRA that is averaged and a personal one that is not, fused by two weights per
client at the end.

Source: Qi et al., "FDLoRA: Personalized Federated Learning of Large Language Model via Dual LoRA
Tuning", arXiv
2406.07925. Every ``H`` rounds the personal LoRA starts again from the global one. At the end each
client fits the two weights of ``w_1 · global + w_2 · personal`` on a few of its own examples.

With ``start = "local"`` the first round trains each client's personal LoRA alone, and the mean of
these is the first global LoRA, as the re-implementation in FedAMoLE does; else (ours) both train
from the shared draw at once.

Where we differ: the server takes FedIT's mean (the paper: an outer optimiser on the mean change);
both LoRAs share a round's local budget; the weights act on the two updates, not on the factors, and
are fitted by gradient on the task's loss (the paper: a gradient-free search), the head frozen. The
fit needs the final global LoRA, so the last round is
local: the personal LoRA trains, then the weights, and nothing is sent. A client that misses it
keeps 0.5 and 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Plan,
    Step,
    Trained,
    Update,
    keep,
    reveal,
)
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.records import OneAdapter, Whole

FUSION = ("fusion.global", "fusion.own")


class FDOptions(contract.WeightedOptions):
    """The keys of ``[method]`` for FDLoRA."""

    start: Literal["shared", "local"] = Field(
        "shared",
        description="What the first round trains: both LoRAs from the shared draw, or the personal "
        "one alone, whose mean over the clients is the first global LoRA.",
    )
    reset_every: int = Field(
        5, ge=1, description="H: rounds after which the personal LoRA restarts from the global."
    )
    personal_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of a round's local budget that trains the personal LoRA.",
    )
    fusion_examples: int = Field(
        16, ge=1, description="Local training examples that the two weights are fitted on."
    )
    fusion_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of the last round's local budget that fits the two weights; 0: both "
        "0.5.",
    )
    fusion_lr: float = Field(
        10.0, gt=0, description="Learning rate of the two weights, in units of train.lr."
    )


@dataclass(frozen=True)
class Fused(Mix):
    """The terms ``global`` and ``own`` with one trained weight each, the same at every site."""

    def weigh(self, at: Junction) -> Sequence[float | Tensor]:
        """As in Mix, a scalar ``[]`` each."""
        return [at.extras[f"fusion.{term}"] for term in at.terms]


@dataclass(frozen=True, eq=False)
class Personal:
    """What stays with a client: its LoRA, the period that it is of, and the two weights."""

    own: Adapter | None = None
    period: int | None = None
    fusion: dict[str, Tensor] = field(default_factory=dict)  # by the names of FUSION, scalars


class FDLoRA(FedIT):
    name = "fdlora"
    title = "FDLoRA"
    laid_out = ("last",)
    paper = "arXiv 2406.07925"
    stale = False
    trains = "A, B of both; two weights"
    shares = "A, B of the global"
    keeps = "personal LoRA, two weights"
    Mine = Personal
    Options: ClassVar[type[contract.Options]] = FDOptions
    no_rule = (
        "its server averages the clients' global adapters as fedit does; aggregate those with fedit"
    )

    # ------------------------------------------------------------------ server
    def aggregate(
        self,
        state: Whole,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> Whole:
        if self._local(round):
            return state
        return super().aggregate(state, round, updates)

    def _local(self, round: int) -> bool:
        """Whether the round is the local one that ends a run; a run of one round has none."""
        return round == self.last > 1

    @property
    def last(self) -> int:
        return self.setting.rounds

    @property
    def complete_from(self) -> int:
        return self.last

    def _alone(self, round: int) -> bool:
        """Whether the round is the one whose personal LoRAs make the first global one."""
        return round == 1 and self.options.start == "local"

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Personal,
        round: int,
    ) -> Plan:
        shared = Step(Assembly((Term("global", offer.whole),)))
        if self._alone(round):
            return [shared]
        own = self._start(offer, mine, round)
        personal = Step(Assembly((Term("own", own, home="client"),)), stream="personal")
        share = self.options.personal_share
        if not self._local(round):
            return [replace(personal, share=share), replace(shared, share=1 - share)]
        share = self.options.fusion_share
        if not share:
            return [personal]
        return [replace(personal, share=1 - share), self._fit(offer, own, mine)]

    def _start(
        self,
        offer: Whole,
        mine: Personal,
        round: int,
    ) -> Adapter:
        """What the personal LoRA starts the round from. Counted in periods, so that a client absent
        in the round of a reset makes up for it.
        """
        if mine.own is not None and mine.period == self._period(round):
            return reveal(mine.own)
        return offer.whole

    def _fit(
        self,
        offer: Whole,
        own: Adapter,
        mine: Personal,
    ) -> Step:
        """The two weights alone, at the personal LoRA that came out of the step before."""
        terms = (Term("global", offer.whole, train=""), Term("own", own, train="", home="client"))
        return Step(
            Assembly(terms, Fused(), self._weights(mine)),
            carries=("own",),
            share=self.options.fusion_share,
            head=False,
            stream="fusion",
            count=self.options.fusion_examples,
        )

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Whole,
        mine: Personal,
        round: int,
    ) -> tuple[OneAdapter, Personal]:
        if self._alone(round):
            first = trained[0].adapter("global")
            return OneAdapter(first), Personal(keep(first), self._period(round))
        kept = replace(
            mine,
            own=trained[0].adapter("own"),
            period=self._period(round),
        )
        if not self._local(round):
            return OneAdapter(trained[1].adapter("global")), kept
        if self.options.fusion_share:
            kept = replace(kept, fusion={name: trained[-1].extra(name) for name in FUSION})
        return OneAdapter(), kept

    def personal(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Personal,
    ) -> Assembly:
        if mine.own is None:
            return Assembly((Term("global", offer.whole),))
        terms = (Term("global", offer.whole, train=""), Term("own", mine.own, home="client"))
        return Assembly(terms, Fused(), self._weights(mine))

    def _period(self, round: int) -> int:
        return (round - 1) // self.options.reset_every

    def _weights(self, mine: Personal) -> dict[str, Extra]:
        found = mine.fusion or {name: torch.tensor(0.5) for name in FUSION}
        return {name: Extra(found[name], lr=self.options.fusion_lr) for name in FUSION}
