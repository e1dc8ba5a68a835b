"""The ``[defence]`` and ``[attack]`` sections of a job: updates that cannot poison, and the attackers
to try that with.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedgrove.job.sections import Section

Above = Annotated[float, Field(gt=0)]


class DefenceSection(Section):
    """What the server does about updates that would spoil the run (docs/defence.md)."""

    rule: Literal[
        "none",
        "median",
        "trimmed-mean",
        "krum",
        "multi-krum",
        "bulyan",
        "geometric-median",
        "outliers",
        "foolsgold",
    ] = Field(
        "none",
        description="What takes the place of the mean, in each group, tier and rank index for "
        "itself. Coordinate rules (median, trimmed-mean, bulyan) need a method that averages "
        "factors.",
    )
    attackers: float = Field(
        0.2,
        gt=0,
        lt=0.5,
        description="The share of clients that may be attackers: what a rule must survive. Groups "
        "too small to have one keep their mean.",
    )
    norm: Above | Literal["median"] | None = Field(
        None,
        description='Largest norm of what a client changes in a round; "median": that of the '
        "round's middle client. Longer changes are shortened by the server. Not set: no bound.",
        examples=[0.5, "median"],
    )

    @property
    def active(self) -> bool:
        """Whether anything is done."""
        return self.rule != "none" or self.norm is not None


class AttackSection(Section):
    """Attackers among simulated clients, to see what a defence is worth."""

    kind: Literal[
        "none",
        "label-flip",
        "backdoor",
        "sign-flip",
        "scale",
        "gaussian",
        "little",
        "adaptive",
    ] = Field(
        "none",
        description="What attackers do: train on wrong labels, plant a trigger, send the opposite, "
        'send a multiple, send noise, stay within the spread of the honest ("little"), or go as '
        'far as the honest are apart and the norm bound allows ("adaptive").',
    )
    share: float = Field(
        0.2,
        gt=0,
        le=0.5,
        description="The share of clients that attack, drawn by run.seed.",
    )
    strength: Above = Field(
        1.0,
        description="Times the honest change (sign-flip, scale), its norm (gaussian) or its "
        "standard deviations (little).",
    )
    target: int = Field(
        0,
        ge=0,
        description="backdoor: the label, by its number, that the trigger is to give.",
    )
    trigger: str = Field(
        "cf",
        min_length=1,
        description="backdoor: the word put in front of a text.",
    )

    @property
    def active(self) -> bool:
        """Whether anybody attacks."""
        return self.kind != "none"

    @property
    def alters(self) -> bool:
        """Whether attackers send something other than what they trained."""
        return self.kind in ("sign-flip", "scale", "gaussian", "little", "adaptive")

    @property
    def tells(self) -> bool:
        """Whether honest clients' rows tell if it worked: attackers train on poisoned rows."""
        return self.kind in ("label-flip", "backdoor", "scale")

    @model_validator(mode="after")
    def _agree(self) -> AttackSection:
        if self.kind == "scale" and self.strength <= 1:
            raise ValueError(
                f"attack.strength = {self.strength:g} makes no larger change with attack.kind = "
                '"scale"; set it above 1, for example 10.'
            )
        return self
