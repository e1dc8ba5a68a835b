"""FDLoRA: a global LoRA that is averaged and a personal one that is not, fused by two weights per
client at the end.

Source: Qi et al., "FDLoRA: Personalized Federated Learning of Large Language Model via Dual LoRA
Tuning", arXiv
2406.07925. Every ``H`` rounds the personal LoRA starts again from the global one. At the end each
client fits the two weights of ``w_1 · global + w_2 · personal`` on a few of its own examples.

Where we differ: the server takes FedIT's mean (the paper: an outer optimiser on the mean change);
both LoRAs share a round's local budget; the weights act on the two updates, not on the factors, and
are fitted by gradient on the task's loss (the paper: a gradient-free search), the head frozen. The
fit needs the final global LoRA, so the last round is
local: the personal LoRA trains, then the weights, and nothing is sent. A client that misses it
keeps 0.5 and 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Mine,
    Plan,
    Step,
    Trained,
    Update,
    reveal,
)
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.records import OneAdapter, Whole

FUSION = ("fusion.global", "fusion.own")


class FDOptions(contract.WeightedOptions):
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
        return [at.extras[f"fusion.{term}"] for term in at.terms]


class FDLoRA(FedIT):
    name = "fdlora"
    title = "FDLoRA"
    paper = "arXiv 2406.07925"
    stale = False
    trains = "A, B of both; two weights"
    shares = "A, B of the global"
    keeps = "personal LoRA, two weights"
    Options: ClassVar[type[contract.Options]] = FDOptions
    no_rule = (
        "its server averages the clients' global adapters as fedit does; aggregate those with fedit"
    )

    # ------------------------------------------------------------------ server
    def aggregate(self, state: Whole, round: int, updates: Sequence[Update[OneAdapter]]) -> Whole:
        if self._local(round):
            return state
        return super().aggregate(state, round, updates)

    def _local(self, round: int) -> bool:
        """Whether the round is the local one that ends a run; a run of one round has none."""
        return round == self.setting.rounds > 1

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Whole, mine: Mine, round: int) -> Plan:
        options, period = self.options, self._period(round)
        # Counted in periods, so that a client absent in the round of a reset makes up for it.
        own = reveal(mine)["own"] if mine.get("period") == period else offer.whole
        personal = Assembly((Term("own", own, home="client"),))
        if not self._local(round):
            return [
                Step(personal, share=options.personal_share, stream="personal"),
                Step(Assembly((Term("global", offer.whole),)), share=1 - options.personal_share),
            ]
        steps = [Step(personal, share=1 - options.fusion_share, stream="personal")]
        if options.fusion_share:
            terms = (
                Term("global", offer.whole, train=""),
                Term("own", own, train="", home="client"),
            )
            both = Assembly(terms, Fused(), self._weights(mine))
            steps.append(
                Step(
                    both,
                    carries=("own",),
                    share=options.fusion_share,
                    head=False,
                    stream="fusion",
                    count=options.fusion_examples,
                )
            )
        return steps

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Whole, mine: Mine, round: int
    ) -> tuple[OneAdapter, Mine]:
        kept = {**mine, "own": trained[0].adapter("own"), "period": self._period(round)}
        if not self._local(round):
            return OneAdapter(trained[1].adapter("global")), kept
        if self.options.fusion_share:
            kept["fusion"] = {name: trained[-1].extra(name) for name in FUSION}
        return OneAdapter(), kept

    def personal(self, client: ClientInfo, offer: Whole, mine: Mine) -> Assembly:
        if "own" not in mine:
            return Assembly((Term("global", offer.whole),))
        terms = (Term("global", offer.whole, train=""), Term("own", mine["own"], home="client"))
        return Assembly(terms, Fused(), self._weights(mine))

    def _period(self, round: int) -> int:
        return (round - 1) // self.options.reset_every

    def _weights(self, mine: Mine) -> dict[str, Extra]:
        found = mine.get("fusion") or {name: torch.tensor(0.5) for name in FUSION}
        return {name: Extra(found[name], lr=self.options.fusion_lr) for name in FUSION}
