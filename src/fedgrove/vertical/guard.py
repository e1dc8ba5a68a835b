"""Client-level differential privacy of a party's messages.

A message, the matrix of a batch as a whole, is clipped to one norm and gets Gaussian noise on every
number. Neighbours differ by a whole party: its messages, or zeros in their place. All that the server
does with the messages is after that, so the count of a party's messages says ε (``privacy.accountant``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.privacy import accountant, randomness
from fedgrove.privacy.gaussian import Grid
from fedgrove.privacy.vector import shortened
from fedgrove.vertical.job import VerticalPrivacySection
from fedgrove.vertical.messages import Message


@dataclass
class Guard:
    """``key``: of the noise, ``course``: whose. ``messages``: how many each party has sent."""

    section: VerticalPrivacySection
    key: str = ""
    course: str = ""
    messages: int = 0

    def protected(self, message: Message, party: str) -> Message:
        """The message as it may leave the party."""
        clip = self.section.clip
        if clip is None:
            return message
        rows = message.rows
        short = shortened(rows.double().flatten(), clip)
        if self.section.noise:
            short = self._noisy(short, clip, party)
        return Message(short.reshape(rows.shape).to(rows.dtype))

    def _noisy(
        self,
        numbers: Float[Tensor, " numbers"],
        clip: float,
        party: str,
    ) -> Float[Tensor, " numbers"]:
        grid = Grid.fine(self.section.noise * clip, clip)
        # that a party diverged would be told without noise: it says nothing, with noise, instead
        steps = grid.cut(torch.nan_to_num(numbers))
        purpose = (self.course, party, self.messages, randomness.digest(steps))
        return grid.noisy(steps, self.key, *purpose)

    def epsilon(self) -> float | None:
        """ε of one party so far; None without noise."""
        return accountant.epsilon(self.section.noise, [(1.0, self.messages)], self.section.delta)
