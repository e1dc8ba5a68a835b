"""All randomness comes from ``(seed, *keys)``: round, client, purpose. Nothing depends on the order
of work.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *keys: object) -> int:
    """A 63-bit integer that depends on every key and on nothing else (SHA-256 of their text)."""
    text = "\x1f".join([str(seed), *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *keys: object) -> torch.Generator:
    """A CPU torch generator for ``(seed, *keys)``."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *keys))


def numpy_rng(seed: int, *keys: object) -> np.random.Generator:
    """A numpy generator for ``(seed, *keys)``."""
    import numpy as np

    return np.random.default_rng(derive(seed, *keys))
