"""What a rule is: it sees all clients' factors of one site at a time, in float64, and says what is
written there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.algebra import rescale, shares
from fedgrove.adapters.noise import aggregation_noise
from fedgrove.aggregate.inputs import Source
from fedgrove.aggregate.options import Options
from fedgrove.ground.errors import AdapterError
from fedgrove.interop.peft import CONFIG

#: A noise below this share of the sum of the clients' updates is the rounding of float64, and
#: reported as 0.
_ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class Task:
    """One aggregation as asked for, checked as far as that does not depend on the rule."""

    sources: Sequence[Source]
    sites: Mapping[str, Site]  # shallow to deep
    weights: list[float] | None
    rank: int | None
    previous: Source | None
    round: int  # one more than that of ``previous``; 1 without it
    options: Any


@dataclass(frozen=True, eq=False)
class Result:
    """One site: the global factors, each client's in order (where the rule has them), and the noise
    of the global.
    """

    whole: Factors | None
    own: Sequence[Factors] | None = None
    noise: float | None = None


class Rule:
    """Base of the rules. ``prepare`` may pass over all sites first; ``site`` is then called once
    for each.
    """

    name: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    takes_rank: ClassVar[bool] = False
    takes_previous: ClassVar[bool] = False
    equal_ranks: ClassVar[bool] = False
    averages_factors: ClassVar[bool] = False  # then scales must be equal, or folded into B
    every_weight: ClassVar[bool] = False  # a weight of 0 would leave a group without a mean
    passes: ClassVar[int] = 1  # over the sites, with that of ``site``

    def __init__(self, task: Task) -> None:
        self.task = task
        self.options = task.options
        self.parts = shares(task.weights, len(task.sources))
        self.round: int = task.round
        self.notes: list[str] = []

    def check(self) -> None:
        """Refuse, from the headers alone, what the rule is undefined for."""
        first = self.task.sources[0]
        for source in self.task.sources[1:]:
            for site in self.task.sites:
                ours, theirs = first.places[site], source.places[site]
                if self.equal_ranks and ours.rank != theirs.rank:
                    raise AdapterError(
                        f"{source.file}: '{theirs.A}' has rank {theirs.rank}, but {ours.rank} in "
                        f"{first.folder}; "
                        f"{self.name} needs equal ranks (hetlora, flexlora, raflora, flora and "
                        f"hilora do not)."
                    )
                if (
                    self.averages_factors
                    and not self.options.rescale
                    and not _close(ours.scale, theirs.scale)
                ):
                    raise AdapterError(
                        f"{source.folder / CONFIG}: alpha / r of '{site}' is {theirs.scale:g}, but "
                        f"{ours.scale:g} in "
                        f"{first.folder}, and a mean of factors is undefined for unequal scales; "
                        f"--option rescale=B "
                        "folds them into B first."
                    )

    def prepare(self, advance: Callable[[], None]) -> None:
        """Passes over all sites before the last, each site followed by ``advance()``. May
        refuse.
        """

    def site(self, name: str, factors: list[Factors]) -> Result:
        """What is written for one site. ``factors``: the clients', float64, in the order given."""
        raise NotImplementedError

    def artefacts(self) -> dict[str, Any]:
        """``{file name: JSON content}``, after the last site."""
        return {}

    # ------------------------------------------------------------------ shared arithmetic
    def scale(self, site: str) -> float:
        """The scale of the global factors: that of the (first) client with the largest rank."""
        return max(
            (source.places[site] for source in self.task.sources), key=lambda place: place.rank
        ).scale

    def top_rank(self, site: str) -> int:
        return self.task.rank or max(source.places[site].rank for source in self.task.sources)

    def common(self, site: str, factors: Sequence[Factors]) -> list[Factors]:
        """All at one scale: equal ones as they are, others folded into B."""
        return [self.at(each, self.scale(site)) for each in factors]

    @staticmethod
    def at(factors: Factors, scale: float) -> Factors:
        """The same update at another scale."""
        if _close(factors.scale, scale):
            return replace(factors, scale=scale)
        return rescale({"": factors}, scale)[""]

    def home(self, site: str, factors: Sequence[Factors]) -> list[Factors]:
        """Each at the scale of the client that it is for."""
        return [
            self.at(each, source.places[site].scale)
            for each, source in zip(factors, self.task.sources, strict=True)
        ]

    def noise(
        self, whole: Factors, ends: Sequence[Factors], parts: Sequence[float] | None = None
    ) -> float:
        """``||G - sum p_i D_i||`` of one site, before G is rounded to the file's precision."""
        parts = self.parts if parts is None else parts
        value = aggregation_noise({"": whole}, [{"": each} for each in ends], parts).sites[""]
        return beyond_rounding(value, ends, parts)


def beyond_rounding(value: float, ends: Sequence[Factors], parts: Sequence[float]) -> float:
    """The value, or 0.0 where it is nothing but the rounding of float64."""
    most = math.fsum(
        part * each.scale * float(each.A.norm() * each.B.norm())
        for part, each in zip(parts, ends, strict=True)
    )
    return 0.0 if value <= _ROUNDING * most else value


def from_svd(
    triplets: tuple[Tensor, Tensor, Tensor],
    rank: int,
    scale: float,
    split: Literal["left", "balanced"],
) -> Factors:
    """The first ``rank`` singular triplets as factors of scale ``scale``; zero modules where there
    are fewer.

    "left": B = U, A = S Vh / s; "balanced": the square root of S / s in both. A direction that the
    update does not have would be zero in both factors of a balanced split, from where no gradient
    moves it: its A gets a row of the length that PEFT's random ones have, its B is zero.
    """
    u, s, vh = triplets
    noise = s[:1].sum() * max(u.shape[0], vh.shape[1]) * torch.finfo(torch.float64).eps
    u, s, vh = u[:, :rank], s[:rank] / scale, vh[:rank]
    if split == "left":
        a, b = s[:, None] * vh, u
    else:
        root, there = s.sqrt(), s * scale > noise
        a, b = torch.where(there, root, 3**-0.5)[:, None] * vh, u * torch.where(there, root, 0.0)
    missing = rank - len(s)
    return Factors(
        torch.nn.functional.pad(a, (0, 0, 0, missing)),
        torch.nn.functional.pad(b, (0, missing)),
        scale,
    )


def _close(first: float, second: float) -> bool:
    """Equal up to the rounding of ``alpha / r``."""
    return math.isclose(first, second, rel_tol=1e-12)
