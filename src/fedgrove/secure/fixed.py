"""Numbers in fixed point modulo 2^32: a sum of them is exact, and means something while it stays below
2^31.

``x · 2^bits``, cut towards zero, with as many bits as ``clients`` numbers up to ``bound`` leave. The
mean is off by less than a step.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgrove.ground.errors import RunError

MODULUS = 1 << 32

Words = NDArray[np.uint32]


def fraction_bits(clients: int, bound: float) -> int:
    """Bits after the point, so that a sum of ``clients`` numbers of size ``bound`` stays below
    2^31.
    """
    return math.floor(math.log2((2**31 - clients) / (clients * bound)))


def step(clients: int, bound: float) -> float:
    """What one unit of the fixed point is worth."""
    return 2.0 ** -fraction_bits(clients, bound)


def in_steps(
    values: Tensor,
    size: float,
    bound: float,
    whose: str,
) -> Tensor:
    """Numbers ``[count]`` in whole steps of ``size``, int64: cut towards zero, so that their norm does
    not grow. Raises ``RunError`` for one that is larger than ``bound``.
    """
    if values.numel():
        most = float(values.abs().max())
    else:
        most = 0.0
    if not most <= bound * (1 + 1e-9):
        raise RunError(
            f"The change of {whose} holds the number {most:g}, and secure aggregation was agreed "
            f"for up to {bound:g}; raise privacy.clip."
        )
    return (values.double() / size).trunc().to(torch.int64)


def to_words(steps: Tensor) -> Words:
    """Whole numbers ``[count]`` modulo 2^32."""
    return (steps.numpy() % MODULUS).astype(np.uint32)


def to_tensor(words: Words) -> Tensor:
    """The same bits as int32 ``[count]``, which a message can hold."""
    return torch.from_numpy(words.view(np.int32).copy())


def from_tensor(tensor: Tensor) -> Words:
    """The bits of an int32 tensor ``[count]``."""
    return tensor.numpy().view(np.uint32)


def signed(total: Words) -> Tensor:
    """A sum modulo 2^32 as the whole number that it stands for, int64 ``[count]``."""
    return to_tensor(total).to(torch.int64)
