"""Random numbers from a secret key: without it noise cannot be told from noise, with it every draw
can be repeated.

A key and a purpose give the numbers (SHAKE-256 makes a key for each purpose, ChaCha20 the stream),
so that a resumed run draws the same. Where a draw hides data, a digest of what it hides is part of
the purpose: were a round ever repeated with other updates, it would have other noise, and the
difference of the two would not show the updates (as signatures derive their nonces, RFC 6979). With
the key ``of_seed`` anyone who knows the job can repeat the draws, and subtract.

The noise itself is in ``fedgrove.privacy.gaussian``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import secrets
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedgrove.ground import files
from fedgrove.ground.errors import FedgroveError, RunError

Randomness = Literal["secret", "seed"]

FILE = "privacy.key"


class CryptographyMissing(FedgroveError):
    """The ``privacy`` extra is not installed."""


def require() -> None:
    """Raises ``CryptographyMissing`` where the generator is not installed."""
    if importlib.util.find_spec("cryptography") is None:
        raise CryptographyMissing(
            "[privacy] needs the package cryptography; install the extra with pip install "
            '"fedgrove[privacy]".'
        )


def fresh() -> str:
    """A new key from the operating system, 32 bytes as hexadecimal digits."""
    return secrets.token_hex(32)


def of_seed(seed: int, *keys: object) -> str:
    """A key that anybody who knows the job can make: for experiments that must repeat."""
    words = [str(key) for key in keys]
    text = "\x1f".join(["fedgrove seed", str(seed), *words])
    return hashlib.sha256(text.encode()).hexdigest()


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
        handle = os.open(
            path,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL,
            0o600,
        )
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(key + "\n")
    except ValueError:
        raise RunError(
            f"{path} is no key; restore the file, or start the run again in a new directory."
        ) from None
    except OSError as error:
        raise files.unwritable(path, error) from error
    return key


class Stream:
    """Random 64-bit integers for a purpose, as many as are asked for: ChaCha20 (RFC 8439) under a
    key of its own.
    """

    def __init__(self, key: str, *purpose: object):
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        text = "\x1f".join(map(str, purpose)).encode()
        own = hashlib.shake_256(bytes.fromhex(key) + text).digest(32)
        # The key serves this one stream, so a counter and a nonce of zero never repeat.
        self._cipher = Cipher(ChaCha20(own, bytes(16)), mode=None).encryptor()

    def words(self, count: int) -> np.ndarray:
        """The next ``count``, uint64."""
        stream = self._cipher.update(bytes(8 * count))
        return np.frombuffer(stream, dtype="<u8")


def uniform(
    key: str,
    count: int,
    *purpose: object,
) -> Tensor:
    """``count`` numbers in [0, 1), float64 with 53 random bits."""
    words = Stream(key, *purpose).words(count)
    bits = words >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) * 2.0**-53)


def digest(values: Tensor) -> str:
    """SHA-256 of the bytes of a tensor ``[...]``, as part of a purpose."""
    here = values.detach().cpu().contiguous()
    content = here.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()
