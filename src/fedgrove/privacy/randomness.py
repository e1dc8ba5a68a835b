"""Random numbers from a secret key: without it noise cannot be told from noise, with it every draw
can be repeated.

A key and a purpose give the numbers (SHAKE-256 as a pseudo-random function, then Box and Muller),
so that a resumed run draws the same. Where a draw hides data, a digest of what it hides is part of
the purpose: were a round ever repeated with other updates, it would have other noise, and the
difference of the two would not show the updates (as signatures derive their nonces, RFC 6979). With
the key ``of_seed`` anyone who knows the job can repeat the draws, and subtract.

Gaussian numbers are float64 with 53 random bits; the attacks on the lowest bits of floating-point
noise (Mironov 2012) are not guarded against.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedgrove.ground import files
from fedgrove.ground.errors import RunError

Randomness = Literal["secret", "seed"]

FILE = "privacy.key"


def fresh() -> str:
    """A new key from the operating system, 32 bytes as hexadecimal digits."""
    return secrets.token_hex(32)


def of_seed(seed: int, *keys: object) -> str:
    """A key that anybody who knows the job can make: for experiments that must repeat."""
    return hashlib.sha256(
        "\x1f".join(["fedgrove seed", str(seed), *map(str, keys)]).encode()
    ).hexdigest()


def kept(folder: Path) -> str:
    """The run's own key at the server, made at the first call; only the file's owner may read
    it.
    """
    path = folder / FILE
    try:
        if path.exists():
            key = path.read_text(encoding="utf-8").strip()
            if len(bytes.fromhex(key)) != 32:
                raise ValueError("its length")
            return key
        key = fresh()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(key + "\n")
    except ValueError:
        raise RunError(
            f"{path} is no key; restore the file, or start the run again in a new directory."
        ) from None
    except OSError as error:
        raise files.unwritable(path, error) from error
    return key


def stream(key: str, count: int, *purpose: object) -> np.ndarray:
    """``count`` random 64-bit integers for a purpose."""
    text = "\x1f".join(map(str, purpose)).encode()
    return np.frombuffer(
        hashlib.shake_256(bytes.fromhex(key) + text).digest(8 * count), dtype="<u8"
    )


def uniform(key: str, count: int, *purpose: object) -> Tensor:
    """``count`` numbers in [0, 1), float64."""
    return torch.from_numpy(
        (stream(key, count, *purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    )


def gaussian(key: str, count: int, *purpose: object) -> Tensor:
    """``count`` standard normal numbers, float64 on the CPU."""
    pairs = (count + 1) // 2
    both = uniform(key, 2 * pairs, *purpose)
    radius = torch.sqrt(-2.0 * torch.log1p(-both[:pairs]))
    angle = 2.0 * math.pi * both[pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def digest(values: Tensor) -> str:
    """SHA-256 of a tensor's numbers, as part of a purpose."""
    return hashlib.sha256(values.detach().cpu().double().contiguous().numpy().tobytes()).hexdigest()
