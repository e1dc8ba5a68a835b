"""PF2LoRA: a shared LoRA that is averaged plus a small private one, trained one after the other in
each round.

Source: Hao et al., "Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank
Learning Approach via Two-Level LoRA" (PF2LoRA), arXiv 2503.03920: ``W0 + s B A + s D C`` with the
shared ``B A`` (rank 8 in the paper) on the upper level and the private ``D C`` (rank 2) on the
lower. Each round trains ``D C`` with ``B A`` frozen, then ``B A`` at the ``D C`` that came out.

Where we differ: the second step ignores how the best ``D C`` depends on ``B A`` (a first-order
version of the paper's bilevel hypergradient); both steps share the round's local budget; the
private module has the global scale α / R. With
``private_share = 0`` there is no private module and this is FedIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from fedgrove.adapters.adapter import Adapter, fresh
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Plan,
    Step,
    Trained,
    reveal,
)
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.records import OneAdapter, Own, Whole


class PF2Options(contract.WeightedOptions):
    private_rank: int = Field(2, ge=1, description="Rank of the private module.")
    private_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of a round's local budget that trains the private module; 0: there is "
        "none.",
    )


class PF2LoRA(FedIT):
    name = "pf2lora"
    title = "PF2LoRA"
    paper = "arXiv 2503.03920"
    trains = "A, B; private C, D"
    shares = "A, B"
    keeps = "C, D"
    Mine = Own
    Options: ClassVar[type[contract.Options]] = PF2Options
    no_rule = (
        "its server averages the clients' shared adapters as fedit does; aggregate those with fedit"
    )

    def plan(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Own,
        round: int,
    ) -> Plan:
        share = self.options.private_share
        shared = Term("global", offer.whole)
        if not share:
            return [Step(Assembly((shared,)))]
        private = Term("own", self._private(mine), home="client")
        return [
            Step(Assembly((shared.frozen(), private)), share=share, stream="private"),
            Step(Assembly((shared, private.frozen())), carries=("own",), share=1 - share),
        ]

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Whole,
        mine: Own,
        round: int,
    ) -> tuple[OneAdapter, Own]:
        if self.options.private_share:
            mine = Own(trained[0].adapter("own"))
        return OneAdapter(trained[-1].adapter("global")), mine

    def personal(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Own,
    ) -> Assembly:
        shared = Term("global", offer.whole)
        if not self.options.private_share:
            return Assembly((shared,))
        return Assembly((shared, Term("own", self._private(mine), home="client")))

    def _private(self, mine: Own) -> Adapter:
        if mine.own is not None:
            return reveal(mine.own)
        setting = self.setting
        return fresh(
            setting.sites,
            self.options.private_rank,
            setting.scale(setting.rank),
            setting.rng("private"),
        )
