"""What a client puts under its masks, and what the server reads in the sum.

A client's change is clipped, in fixed point, and times its weight; where weights differ, the weight
stands behind it, so that the server learns the sum of both and divides. With ``client_noise`` each
client adds its share of the noise before it masks: as much as makes the whole of it where the fewest
answer that the threshold allows (Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism
for Federated Learning with Secure Aggregation", ICML 2021). So the server never sees an exact sum. A
sum of discrete Gaussians is no discrete Gaussian, but for a share of ``LEAST`` steps or more the
divergence between the two, at most 10 m exp(-π² s²) for m clients, is below what a double can tell
from nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedgrove.ground.errors import RunError
from fedgrove.privacy import randomness
from fedgrove.privacy.gaussian import discrete_gaussian
from fedgrove.secure import fixed
from fedgrove.secure.graph import THRESHOLD, needed
from fedgrove.secure.messages import Terms

if TYPE_CHECKING:
    from pathlib import Path

    from fedgrove.job import Job
    from fedgrove.job.privacy import PrivacySection
    from fedgrove.methods.contract import Method

MASKED = "masked"  # the one part of a masked update
LEAST = 16  # steps in one standard deviation of a client's share of the noise
TAIL = 12  # standard deviations that the sum of the noise has room for


@dataclass(frozen=True)
class Opened:
    """The sum of a round under masks: whole steps, int64 ``[numbers]``, and behind them the sum of the
    weights where they differ. ``clients``: how many agreed on the round; ``scale``: of the weights.
    """

    steps: Tensor
    clients: int
    scale: int | None = None


@dataclass(frozen=True)
class Format:
    """How the numbers of a round of ``clients`` are written, which all of them work out alike."""

    step: float
    deviation: int  # of one client's share of the noise, in steps; 0: there is none

    @classmethod
    def of(cls, section: PrivacySection, clients: int) -> Format:
        clip = float(section.clip or 0.0)
        fewest = needed(section.threshold or THRESHOLD, clients)
        share = section.client_noise * clip / math.sqrt(fewest)
        step = fixed.step(clients, clip + TAIL * share / math.sqrt(clients))
        if share == 0:
            return cls(step, 0)
        return cls(step, max(LEAST, math.ceil(share / step)))


def terms(job: Job, run: str, round: int, attempt: str) -> Terms:
    """What the members of a round agree on."""
    section = job.privacy
    threshold = section.threshold or THRESHOLD
    least = max(2, job.federation.min_clients)
    return Terms(run, round, attempt, threshold, section.neighbours, least)


def weighted(method: Method) -> bool:
    """Whether the mean has a weight for each client."""
    return getattr(method.options, "weights", "uniform") != "uniform"


def noise_key(job: Job, folder: Path | None) -> str:
    """The secret that a client's share of the noise comes from, kept in ``folder`` where there is one."""
    if job.privacy.client_noise and job.privacy.randomness == "secret":
        return randomness.fresh() if folder is None else randomness.kept(folder)
    return randomness.of_seed(job.run.seed, "share of the noise")


@dataclass(frozen=True)
class Addition:
    """What one client adds in one round. ``examples`` and ``scale``: its weight is one by the other."""

    client: str
    round: int
    change: Tensor  # float64 ``[numbers]``
    examples: int = 1
    scale: int | None = None

    def words(self, section: PrivacySection, clients: int, key: str) -> fixed.Words:
        """Its vector before the masks: ``[numbers]``, or ``[numbers + 1]`` with the weight. Raises
        ``RunError`` where it is larger than was agreed.
        """
        how, change = Format.of(section, clients), self.change
        if self.scale is not None:
            if not 0 < self.examples <= self.scale <= fixed.MODULUS // 2 // clients:
                raise RunError(
                    f"{self.client} has {self.examples} examples, and the server weighs them by "
                    f"{self.scale}; that is no weight."
                )
            change = change * (self.examples / self.scale)
        steps = fixed.in_steps(change, how.step, float(section.clip or 0.0), self.client)
        if how.deviation:
            purpose = ("share", self.round, self.client, clients, randomness.digest(steps))
            drawn = discrete_gaussian(randomness.Stream(key, *purpose), len(steps), how.deviation)
            steps = steps + torch.from_numpy(drawn)
        words = fixed.to_words(steps)
        if self.scale is None:
            return words
        return np.append(words, np.uint32(self.examples))


def read(section: PrivacySection, opened: Opened, length: int) -> tuple[Tensor, float | None]:
    """(the sum of the changes, float64 ``[length]``; the sum of their weights where they differ).

    Raises ``RunError`` where it has another length.
    """
    behind = 0 if opened.scale is None else 1
    if opened.steps.shape != (length + behind,):
        raise RunError(
            f"The masked sum has {len(opened.steps)} numbers, and {length + behind} are the "
            "method's; the sites run different versions."
        )
    total = opened.steps[:length].double() * Format.of(section, opened.clients).step
    if opened.scale is None:
        return total, None
    return total, float(opened.steps[length]) / opened.scale
