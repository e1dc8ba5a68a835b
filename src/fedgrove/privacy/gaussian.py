"""Gaussian noise on a grid, drawn exactly: no bit of what is released tells more than the accounting
says.

Noise in floating point leaks through its lowest bits, because not every sum of a value and a draw
can be reached from every value (Mironov, "On Significance of the Least Significant Bits for
Differential Privacy", CCS 2012). Here everything is a whole number of grid steps instead: what each
member adds is cut towards zero, so that it never grows, the sum is exact, and the noise is the
discrete Gaussian of Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy"
(NeurIPS 2020), whose probability at k is proportional to exp(-k² / 2s²).

It is their rejection sampler. Every coin of theirs, of probability exp(-γ), is thrown by comparing
64 random bits with the exponential in double precision; where the two are too close to tell, which
happens to one coin in 2^39, it is settled in exact arithmetic with as many more bits as it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgrove.privacy.randomness import Stream

STEPS = 1 << 24  # grid steps in one standard deviation, where the grid may be chosen
WIDEST = 1 << 31  # of a standard deviation, in grid steps
CHUNK = 1 << 14  # candidates at a time, which stay in the processor's cache
TIE = 2.0**-40  # closer than this, double precision does not settle a coin

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Multiples of ``step``, and the standard deviation of the noise on them, in steps."""

    step: float
    deviation: int

    @classmethod
    def fine(cls, deviation: float, bound: float) -> Grid:
        """A grid for noise of this standard deviation on a sum of numbers up to ``bound``: so fine
        that it takes nothing from them, so coarse that 2^22 of them add up in 63 bits.
        """
        coarsest = bound * 2.0**-40
        if deviation < coarsest * STEPS:
            return cls.given(coarsest, deviation)
        return cls(deviation / STEPS, STEPS)

    @classmethod
    def given(cls, step: float, deviation: float) -> Grid:
        """Noise on a grid that is given: of this standard deviation, rounded up to whole steps."""
        return cls(step, max(1, math.ceil(deviation / step)))

    def cut(self, values: Tensor) -> Tensor:
        """``values`` ``[...]`` in whole steps, int64 of the same shape: towards zero, so that no norm
        grows.
        """
        return (values.double() / self.step).trunc().to(torch.int64)

    def noisy(
        self,
        total: Tensor,
        key: str,
        *purpose: object,
    ) -> Tensor:
        """The sum ``total`` (int64 ``[numbers]``, in steps) with its noise, float64 on the CPU."""
        exact = total.cpu()
        stream = Stream(key, *purpose)
        noise = discrete_gaussian(stream, len(exact), self.deviation)
        whole = exact + torch.from_numpy(noise)
        return whole.double() * self.step


def discrete_gaussian(
    stream: Stream,
    count: int,
    deviation: int,
    *,
    tie: float = TIE,
) -> Integers:
    """``count`` independent draws, int64: k has a probability proportional to exp(-k² / 2s²).

    ``deviation``: s, 1 to 2^31. ``tie``: where double precision gives way to exact arithmetic;
    changes no draw.
    """
    if not 1 <= deviation <= WIDEST:
        raise ValueError(f"a deviation of {deviation} steps is not between 1 and {WIDEST}")
    found: list[Integers] = []
    missing = count
    while missing > 0:
        # About one candidate in 2.1 is taken, fewer where s is far below a power of two.
        power_of_two = 1 << (deviation - 1).bit_length()
        share = 0.47 * deviation / power_of_two
        likely = int(missing / share) + 64
        accepted = _candidates(
            stream,
            min(likely, CHUNK),
            deviation,
            tie,
        )
        kept = accepted[:missing]
        found.append(kept)
        missing -= len(kept)
    if found:
        return np.concatenate(found)
    return np.zeros(0, np.int64)


def _candidates(
    stream: Stream,
    count: int,
    deviation: int,
    tie: float,
) -> Integers:
    """Draws of a discrete Laplace distribution of scale s, those of them that a coin takes.

    A size is x = u + s v: u uniform below s, v geometric with e^-1. The coin is theirs for u,
    exp(-u / s), and theirs for x, exp(-(x - s)² / 2s²), as one.
    """
    words = stream.words(3 * count)
    first, second, third = words.reshape(3, count)
    bits = (deviation - 1).bit_length()
    lowest = np.uint64((1 << bits) - 1)
    offset = (first >> np.uint64(1)) & lowest
    negative = (first & np.uint64(1)).astype(bool)
    times = _geometric(second, stream)
    size = offset.astype(np.int64) + deviation * times
    beyond = (size - deviation) / deviation
    exponent = offset / deviation + beyond**2 / 2

    def exactly(at: int) -> Fraction:
        u, x = int(offset[at]), int(size[at])
        of_u = Fraction(u, deviation)
        of_x = Fraction((x - deviation) ** 2, 2 * deviation**2)
        return of_u + of_x

    taken = _coins(
        third,
        exponent,
        exactly,
        stream,
        tie,
    )
    taken &= offset < np.uint64(deviation)  # u is uniform below s, and nothing else
    taken &= ~(negative & (size == 0))  # there is one zero, not two
    draws = np.where(negative, -size, size)
    return draws[taken]


def _coins(
    words: Words,
    exponent: NDArray[np.float64],
    exactly: Callable[[int], Fraction],
    stream: Stream,
    tie: float,
) -> NDArray[np.bool_]:
    """A coin of probability exp(-γ) for each word; ``exactly`` gives γ where it is close."""
    chance = np.exp(-exponent)
    drawn = words * 2.0**-64
    heads = drawn < chance
    close = np.abs(drawn - chance) <= tie
    for at in np.flatnonzero(close):
        word = int(words[at])
        exact = exactly(int(at))
        heads[at] = _below(word, exact, stream)
    return np.asarray(heads, dtype=bool)


def _geometric(words: Words, stream: Stream) -> Integers:
    """How often in a row a coin of probability e^-1 falls, one number for each word."""
    above = np.searchsorted(_THRESHOLDS, words)
    found = np.int64(len(_THRESHOLDS) - 1) - above
    unsettled = _THRESHOLDS[above] == words
    for at in np.flatnonzero(unsettled):
        word = int(words[at])
        times = 0
        while _below(word, Fraction(times + 1), stream):
            times += 1
        found[at] = times
    return found


def _below(
    word: int,
    exponent: Fraction,
    stream: Stream,
) -> bool:
    """Whether the number whose first 64 bits after the point are ``word`` is below exp(-γ)."""
    drawn, bits = word, 64
    while True:
        low, high = _bounds(exponent, bits)
        if drawn < low:
            return True
        if drawn > high:
            return False
        more = int(stream.words(1)[0])
        drawn = (drawn << 64) | more
        bits += 64


def _bounds(exponent: Fraction, bits: int) -> tuple[int, int]:
    """Whole numbers around exp(-γ) 2^bits: not above it, and at least it less one."""
    context = Context(prec=bits // 3 + 40)
    above, below = Decimal(-exponent.numerator), Decimal(exponent.denominator)
    power = context.divide(above, below)
    scaled = context.multiply(context.exp(power), Decimal(2**bits))
    margin = Decimal(1).scaleb(-15)  # far more than what the four operations round
    low = context.subtract(scaled, margin)
    high = context.add(scaled, margin)
    return int(low), int(high)


#: floor(2^64 e^-j) for j = 45 ... 0, ascending: a coin has fallen j times where the word is below.
_THRESHOLDS = np.array([_bounds(Fraction(j), 64)[0] for j in range(45, -1, -1)], dtype=np.uint64)
