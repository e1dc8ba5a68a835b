"""What a pool's owner can choose: a router, how its members' parts add up, and the router's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from fedgrove.adapters.routers import Compose
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.options import Options


class UniformOptions(Options):
    """All members alike."""


class RetrieveOptions(Options):
    """LoraRetriever."""


class ArrowOptions(Options):
    """Arrow."""

    score: Literal["inner", "cosine"] = Field(
        "inner",
        description="What tokens are compared by; cosine divides by their length.",
    )


class AttentionOptions(Options):
    """RAMoLE."""

    width: int = Field(8, ge=1, description="ρ, the rank of the router's factors.")
    seed: int = Field(0, ge=0, description="Of the router's first values.")


class ComponentsOptions(Options):
    """HiLoRA-routing."""

    gamma: float = Field(
        0.4,
        gt=0,
        le=1,
        description="The share of the candidates' ranks that runs.",
    )
    tau: float = Field(0.02, gt=0, description="How evenly it is dealt among them.")
    threshold: Literal["quantile", "density"] = Field(
        "quantile",
        description="Candidates: above a quantile of the member's own scores, or, as published, "
        "where its density is above 1.",
    )
    sampling: Literal["remainder", "multinomial"] = Field(
        "remainder",
        description="Deal the budget by largest remainder, or draw it.",
    )
    components: Literal["svd", "trained"] = Field(
        "svd",
        description="Rank-1 components of a member: its singular triplets, or its factors' rows as "
        "they were trained, which the factors' basis decides.",
    )
    normalise: bool = Field(True, description="Multiply by √(mean rank / budget).")
    seed: int = Field(0, ge=0, description="Of multinomial draws.")


OPTIONS: dict[str, type[Options]] = {
    "retrieve": RetrieveOptions,
    "arrow": ArrowOptions,
    "roc": ComponentsOptions,
    "attention": AttentionOptions,
    "uniform": UniformOptions,
}
#: which signature a router reads
READS: Mapping[str, Literal["mean", "gaussian"] | None] = {
    "retrieve": "mean",
    "arrow": None,
    "roc": "gaussian",
    "attention": "mean",
    "uniform": None,
}
#: how members' parts can add up, by router; the first is meant where nothing is said
COMPOSE: Mapping[str, tuple[Compose, ...]] = {
    "retrieve": ("mixture", "fusion", "ensemble"),
    "arrow": ("mixture",),
    "roc": ("mixture",),
    "attention": ("mixture",),
    "uniform": ("mixture", "fusion", "ensemble"),
}


def check(router: str, compose: str) -> None:
    """Raises ``AdapterError`` for a router or a way that there is not."""
    if router not in OPTIONS:
        raise AdapterError(f"--router {router}: choose from {', '.join(OPTIONS)}.")
    if compose not in COMPOSE[router]:
        raise AdapterError(
            f"--compose {compose}: the router {router} adds up by {' or '.join(COMPOSE[router])}."
        )
