"""FedRot-LoRA: every client turns its rank space to the last global one before the factors are
averaged.

Source: Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", arXiv
2602.23638. Rounds align A and B in turn to the last global factors, by a soft Procrustes rotation R;
the client sends ``(R^T A, B R)``, whose product is that of ``(A, B)``. The first round is skipped,
since the global B is still zero; the second aligns A, as the authors' code does
(github.com/haoran-zh/FedRot-LoRA at 36a67ef counts rounds from 0 and aligns A in odd ones).

Where we differ: ``at = "server"`` runs the same arithmetic at the server, for clients that only
know FedIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.rotation import align
from fedgrove.ground.plain import Plain
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Mine,
    Trained,
    Update,
    WeightedOptions,
    shares,
)
from fedgrove.methods.fedit import FedIT, MeanOfFactors
from fedgrove.methods.protocols import EACH
from fedgrove.methods.records import OneAdapter, Whole
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine


class RotOptions(WeightedOptions):
    """FedRot-LoRA's keys."""

    lam: float = Field(
        0.5, ge=0, le=1, description="Strength of the rotation: 0 is FedIT, 1 the full rotation."
    )
    at: Literal["client", "server"] = Field(
        "client", description="Who rotates; the result is the same."
    )


@dataclass
class RotatedMean:
    """FedIT's means of factors that were turned to the last global ones."""

    options: RotOptions
    round: Round
    needs: ClassVar[Needs] = Needs(
        equal_ranks=True,
        equal_scales=True,
        previous=True,
        rounds=True,
        options=("lam",),
    )

    @property
    def factor(self) -> Literal["", "A", "B"]:
        """What is aligned in this round; "" in the first."""
        if self.round.number == 1:
            return ""
        if self.round.number % 2:
            return "B"
        return "A"

    def turned(
        self,
        factors: Factors,
        previous: Factors | None,
    ) -> Factors:
        """A client's factors with their rank space turned to that of the last global ones."""
        if previous is None or self.factor == "":
            return factors
        return align(factors, previous, self.factor, self.options.lam)

    def site(self, given: Arrived) -> Outcome:
        turned = [{given.name: self.turned(each, given.previous)} for each in given.factors]
        return Outcome(whole=mean(turned, given.weights)[given.name])

    def notes(self) -> list[str]:
        if self.factor == "":
            return ["This is the first round: nothing was rotated, as fedit."]
        return [f"Round {self.round.number}: aligned {self.factor} to the last global adapter."]

    def artefacts(self, clients: Sequence[str]) -> Plain:
        return {}


class FedRotLoRA(FedIT):
    name = "fedrot-lora"
    title = "FedRot-LoRA"
    paper = "arXiv 2602.23638"
    stale = False
    averages_factors = False  # of the rotated ones, which no client runs
    Options: ClassVar[type[contract.Options]] = RotOptions
    Rule: ClassVar[type[ServerRule]] = RotatedMean

    def needs_each(self) -> str:
        return EACH

    def aggregate(
        self,
        state: Whole,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> Whole:
        if self.options.at == "server":
            kind = self.Rule
        else:
            kind = MeanOfFactors
        arrivals = Arrivals(
            self.setting,
            [update.content.adapter for update in updates],
            shares(updates, self.options.weights),
            previous=state.whole,
        )
        rule = kind(self.options, Round(self.setting.sites, round))
        return Whole(combine(rule, arrivals).whole)

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Whole,
        mine: Mine,
        round: int,
    ) -> tuple[OneAdapter, Mine]:
        adapter = trained[-1].adapter("global")
        if self.options.at == "client":
            rule = RotatedMean(self.options, Round(self.setting.sites, round))
            whole = offer.whole
            adapter = {site: rule.turned(f, whole[site]) for site, f in adapter.items()}
        return OneAdapter(adapter), mine
