"""The ``[privacy]`` section of a job: what may be learnt of a client, or of an example, from what
leaves.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedgrove.job.sections import Section

Above = Annotated[float, Field(gt=0)]


class PrivacySection(Section):
    """Noise and clipping with a counted budget, and secure aggregation (docs/privacy.md)."""

    clip: Above | None = Field(
        None,
        description="Client level: largest norm of what a client changes in a round, over all that "
        "it sends; clipped "
        "at the client. Not set: no limit.",
        examples=[0.5],
    )
    client_noise: float = Field(
        0.0,
        ge=0,
        description="Client level: standard deviation of the noise that the server adds to the sum "
        "of the changes, in "
        "units of clip.",
    )
    example_clip: Above | None = Field(
        None,
        description="Example level (DP-SGD): largest norm of one example's gradient. Not set: "
        "plain training.",
        examples=[1.0],
    )
    example_noise: float = Field(
        0.0,
        ge=0,
        description="Example level: standard deviation of the noise that a client adds to each "
        "step's sum of "
        "gradients, in units of example_clip.",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="The delta at which epsilon is told. Not set: 1 / N^1.1, of N clients, or N "
        "examples of a client.",
        examples=[1e-5],
    )
    randomness: Literal["secret", "seed"] = Field(
        "secret",
        description="Where noise comes from: a key of the system that stays where it was made, or "
        "run.seed, so that "
        "runs repeat and nobody who knows the job is kept from subtracting it.",
    )
    secure_aggregation: bool = Field(
        False,
        description="The server gets masked updates, of which only the sum can be read; needs "
        "clip.",
    )

    threshold: Annotated[float, Field(gt=0.5, le=1)] | None = Field(
        None,
        description="Secure aggregation: the share of a round's clients without whose updates their "
        "sum stays closed. Not set: 2/3.",
        examples=[0.75],
    )
    neighbours: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Secure aggregation: with how many others each client masks. Not set: with all "
        "in a round of up to 64, else as few as are safe (docs/privacy.md).",
        examples=[100],
    )

    @model_validator(mode="after")
    def _agree(self) -> PrivacySection:
        for noise, clip, what in (
            ("client_noise", "clip", "what a client can change"),
            ("example_noise", "example_clip", "one example's gradient"),
        ):
            if getattr(self, noise) and getattr(self, clip) is None:
                raise ValueError(
                    f"privacy.{noise} = {getattr(self, noise):g} is measured in privacy.{clip}, "
                    f"which limits {what}; "
                    f"set privacy.{clip}."
                )
        if self.secure_aggregation and self.clip is None:
            raise ValueError(
                "privacy.secure_aggregation sends numbers in fixed point, which needs a limit on "
                "their size; "
                "set privacy.clip."
            )
        return self

    @property
    def client_level(self) -> bool:
        """Whether something happens between an update and the server."""
        return self.clip is not None

    @property
    def example_level(self) -> bool:
        return self.example_clip is not None
