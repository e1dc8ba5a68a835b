"""LoRA-FAIR: the server corrects the mean of B so that its product points where the mean of the
products points.

Source: Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", arXiv
2411.14961. Per site, ``dB`` minimises ``1 - cos(dW, (mean(B) + dB) mean(A)) + lam ||dB||`` with
``dW = sum p_i B_i A_i``; clients start from ``(mean(A), mean(B) + dB)``.

Where we differ: the paper leaves the solver open. Ours is gradient descent from ``dB = 0`` with
step ``lr``, until a step gains less than ``tol`` or after ``max_steps``; a step that would make it
worse is halved instead of taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from pydantic import Field

from fedgrove.adapters.algebra import concat, mean, widen
from fedgrove.adapters.residual import fair_correction
from fedgrove.methods import contract
from fedgrove.methods.contract import WeightedOptions
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.protocols import EACH
from fedgrove.methods.rule import Arrived, Needs, Outcome, Round, ServerRule


class FairOptions(WeightedOptions):
    """LoRA-FAIR's keys."""

    lam: float = Field(
        0.01, ge=0, description="Weight of the size of the correction (the paper's value)."
    )
    lr: float = Field(0.01, gt=0, description="The server's step size.")
    tol: float = Field(1e-6, ge=0, description="Stop when a step gains less than this.")
    max_steps: int = Field(1000, ge=0, description="Most steps for each adapted layer; 0 is FedIT.")


@dataclass
class CorrectedMean:
    """FedIT's means with the correction in B."""

    options: FairOptions
    round: Round
    needs: ClassVar[Needs] = Needs(
        equal_ranks=True, equal_scales=True, options=("lam", "lr", "tol", "max_steps")
    )

    def site(self, given: Arrived) -> Outcome:
        whole = mean(given.adapters, given.weights)[given.name]
        target = concat([widen(each) for each in given.adapters], given.weights)[given.name]
        change = fair_correction(
            target,
            whole,
            lam=self.options.lam,
            lr=self.options.lr,
            tol=self.options.tol,
            max_steps=self.options.max_steps,
        )
        return Outcome(whole=replace(whole, B=whole.B + change))


class LoRAFair(FedIT):
    name = "lora-fair"
    title = "LoRA-FAIR"
    paper = "arXiv 2411.14961"
    stale = False
    averages_factors = False
    centres = "weights"
    Options: ClassVar[type[contract.Options]] = FairOptions
    Rule: ClassVar[type[ServerRule]] = CorrectedMean

    def needs_each(self) -> str:
        return EACH
