"""Example-level privacy: DP-SGD (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016)
on what trains.

Each step draws every training example by its own coin of probability ``rate`` (Poisson sampling,
which the accounting assumes), clips each drawn example's gradient over all trained numbers together
to the norm ``clip``, adds Gauss noise of ``noise · clip`` to the sum, and divides by the expected
batch. What an optimiser, a method or a server makes of that costs no more. Each client counts its
own budget from its own number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgrove.ground.plain import Given, Plain
from fedgrove.privacy import accountant, randomness
from fedgrove.privacy.gaussian import Grid
from fedgrove.privacy.vector import within

if TYPE_CHECKING:
    from fedgrove.job.privacy import PrivacySection

NOTES = "privacy"  # its part of a client's private store


@dataclass
class ExampleGuard:
    """One client's guard through one stretch of work; ``notes`` is what its store keeps for the
    next.
    """

    clip: float
    noise: float
    key: str
    spent: list[tuple[float, int]] = field(default_factory=list)  # (rate, steps)

    @classmethod
    def of(
        cls,
        section: PrivacySection,
        store: Given,
        seed: int,
        client: str,
    ) -> ExampleGuard | None:
        """The guard of a client with this store; None where the job asks for none."""
        if section.example_clip is None:
            return None
        notes = store.get(NOTES, {})
        key = notes.get("key")
        if not key and section.randomness == "secret":
            key = randomness.fresh()
        elif not key:
            key = randomness.of_seed(seed, "client", client)
        spent: list[tuple[float, int]] = []
        for rate, steps in notes.get("spent", []):
            spent.append((float(rate), int(steps)))
        return cls(
            section.example_clip,
            section.example_noise,
            str(key),
            spent,
        )

    def notes(self) -> Plain:
        spent = [[rate, steps] for rate, steps in self.spent]
        return {"key": self.key, "spent": spent}

    def draw(
        self,
        examples: int,
        rate: float,
        *purpose: object,
    ) -> list[int]:
        """Who is in a step's batch: a coin for each example. May be nobody."""
        if rate >= 1:
            return list(range(examples))
        coins = randomness.uniform(self.key, examples, "batch", *purpose)
        return torch.nonzero(coins < rate).flatten().tolist()

    def step(
        self,
        gradients: Iterable[Sequence[Tensor | None]],
        leaves: Sequence[Tensor],
        expected: float,
        *purpose: object,
    ) -> list[Tensor]:
        """The step's noisy mean gradient of each leaf, from each example's own: ``[...]`` as it."""
        if self.noise:
            total = self._noisy_sum(gradients, leaves, purpose)
        else:
            total = [torch.zeros_like(leaf) for leaf in leaves]
            for one in gradients:
                shrink = self._shrink(one)
                for whole, part in zip(total, one, strict=True):
                    if part is not None:
                        whole.add_(part, alpha=shrink)
        return [whole / expected for whole in total]

    def _noisy_sum(
        self,
        gradients: Iterable[Sequence[Tensor | None]],
        leaves: Sequence[Tensor],
        purpose: tuple[object, ...],
    ) -> list[Tensor]:
        """The sum of the clipped gradients with its noise: for each leaf one of its shape
        ``[...]``.
        """
        grid = Grid.fine(self.noise * self.clip, self.clip)
        steps: list[Tensor] = []
        for leaf in leaves:
            nothing = torch.zeros(leaf.shape, dtype=torch.int64, device=leaf.device)
            steps.append(nothing)
        for one in gradients:
            shrink = self._shrink(one)
            for whole, part in zip(steps, one, strict=True):
                if part is not None:
                    clipped = part.double() * shrink
                    whole += grid.cut(clipped)
        flat = torch.cat([each.flatten().cpu() for each in steps])
        noisy = grid.noisy(
            flat,
            self.key,
            "step",
            *purpose,
            randomness.digest(flat),
        )
        parts = torch.split(noisy, [leaf.numel() for leaf in leaves])
        shaped: list[Tensor] = []
        for part, leaf in zip(parts, leaves, strict=True):
            here = part.reshape(leaf.shape).to(leaf.device, leaf.dtype)
            shaped.append(here)
        return shaped

    def _shrink(self, gradient: Sequence[Tensor | None]) -> float:
        """What an example's gradient, one ``[...]`` for each leaf, is multiplied by, so that its
        norm is at most ``clip``.
        """
        norm = norm_of([part for part in gradient if part is not None])
        most = within(self.clip)
        if norm <= most:
            return 1.0
        return most / norm

    def count(self, rate: float, steps: int) -> None:
        """Add steps to the budget."""
        counted = dict(self.spent)
        counted[rate] = counted.get(rate, 0) + steps
        self.spent = list(counted.items())

    def report(self, section: PrivacySection, examples: int) -> Plain:
        """What the client's own card tells: its ε at δ = 1 / n^1.1 of its n examples, or the
        job's.
        """
        delta = section.delta or accountant.default_delta(examples)
        return {
            "epsilon": accountant.epsilon(self.noise, self.spent, delta),
            "delta": delta,
            "noise": self.noise,
            "clip": self.clip,
            "steps": sum(steps for _, steps in self.spent),
            "randomness": section.randomness,
        }


def norm_of(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all numbers of the tensors ``[...]`` together, in float64."""
    squares: list[float] = []
    for each in tensors:
        norm = torch.linalg.vector_norm(each.double())
        squares.append(float(norm) ** 2)
    return math.sqrt(math.fsum(squares))
