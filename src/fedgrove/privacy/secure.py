"""Secure aggregation: the server gets masked integers of which only the sum over all clients means
anything.

Each pair of clients agrees on a secret (X25519, HKDF-SHA256) and turns it into a stream of integers
(AES-256 in counter mode) that one adds to its vector and the other subtracts, modulo 2^32; in the
sum masks cancel. This is the pairwise half of Bonawitz et al., "Practical Secure Aggregation for
Privacy-Preserving Machine Learning" (CCS 2017). Not in it: self-masks and shares of keys, so a
client that answers nothing leaves a sum that cannot be read, and the round fails. The server passes
the public keys on; one that hands out keys of its own could read updates (sign the keys, or
exchange them elsewhere). Keys are new in each round.

Numbers travel in fixed point: ``x · 2^bits``, cut towards zero, with as many bits as ``clients``
numbers up to ``bound`` leave below 2^31. The sum is then exact, and the mean is off by less than a
step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedgrove.ground.errors import RunError

MODULUS = 1 << 32
MASKED = "masked"  # the one part of a masked update


def fraction_bits(clients: int, bound: float) -> int:
    """Bits after the point, so that a sum of ``clients`` numbers of size ``bound`` stays below
    2^31.
    """
    room = (2**31 - clients) / (clients * bound)
    return math.floor(math.log2(room))


def step(clients: int, bound: float) -> float:
    """What one unit of the fixed point is worth."""
    return 2.0 ** -fraction_bits(clients, bound)


def to_fixed(
    values: Float[Tensor, " count"],
    clients: int,
    bound: float,
    whose: str,
) -> np.ndarray:
    """Numbers ``[count]`` in fixed point modulo 2^32, uint32: cut towards zero, so that their norm
    does not grow. Raises ``RunError`` for one that is larger than ``bound``.
    """
    if values.numel():
        most = float(values.abs().max())
    else:
        most = 0.0
    if not most <= bound * (1 + 1e-9):
        raise RunError(
            f"The change of {whose} holds the number {most:g}, and secure aggregation was agreed "
            f"for up to {bound:g}; "
            "raise privacy.clip."
        )
    steps = values.double() / step(clients, bound)
    whole = steps.trunc().to(torch.int64)
    residues = whole.numpy() % MODULUS
    return residues.astype(np.uint32)


def signed(total: np.ndarray) -> Int[Tensor, " count"]:
    """A sum modulo 2^32 as the whole number that it stands for, int64 ``[count]``."""
    residues = total.astype(np.uint32)
    whole = residues.view(np.int32)
    return torch.from_numpy(whole.astype(np.int64))


class Party:
    """One client's side of one round."""

    def __init__(self, name: str, round: int):
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.name, self.round = name, round
        self._key = X25519PrivateKey.generate()

    @property
    def public(self) -> bytes:
        """What the others get, through the server: 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def mask(
        self,
        fixed: np.ndarray,
        publics: Mapping[str, bytes],
    ) -> Int[Tensor, " count"]:
        """The vector with every pair's mask, as int32 (the same bits): all that the server sees of
        it.
        """
        if len(publics) < 2:
            raise RunError(
                "Secure aggregation needs two clients or more in a round, because the sum of one "
                "is its update."
            )
        total = fixed.astype(np.uint32).copy()
        for other, public in publics.items():
            if other == self.name:
                continue
            stream = self._stream(other, public, len(total))
            # uint32: modulo 2^32
            if self.name < other:
                total = total + stream
            else:
                total = total - stream
        bits = total.view(np.int32)
        return torch.from_numpy(bits.copy())

    def _stream(
        self,
        other: str,
        public: bytes,
        count: int,
    ) -> np.ndarray:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        theirs = X25519PublicKey.from_public_bytes(public)
        shared = self._key.exchange(theirs)
        names = sorted([self.name, other])
        pair = "\x1f".join(["fedgrove mask", str(self.round), *names])
        derivation = HKDF(
            algorithm=hashes.SHA256(),
            length=32,
            salt=None,
            info=pair.encode(),
        )
        key = derivation.derive(shared)
        # The key serves one vector of one pair in one round, so a counter from zero never repeats.
        counter = modes.CTR(bytes(16))
        cipher = Cipher(algorithms.AES256(key), counter).encryptor()
        stream = cipher.update(bytes(4 * count)) + cipher.finalize()
        numbers = np.frombuffer(stream, dtype="<u4")
        return numbers.astype(np.uint32)


def summed(masked: Sequence[Int[Tensor, " count"]]) -> np.ndarray:
    """The sum of masked vectors modulo 2^32, uint32: that of the plain ones where every party of
    the round is in it.
    """
    total = np.zeros(len(masked[0]), dtype=np.uint32)
    for vector in masked:
        total = total + vector.numpy().view(np.uint32)
    return total


class Room:
    """All parties of one round in this process, for a simulation. Each masks with its key and the
    others' public.
    """

    def __init__(self, round: int, clients: Sequence[str]):
        self.parties = {name: Party(name, round) for name in clients}
        self.publics = {name: party.public for name, party in self.parties.items()}

    def conceal(
        self,
        client: str,
        change: Float[Tensor, " count"],
        bound: float,
    ) -> dict[str, Tensor]:
        """What the client sends instead of its update: its change, in fixed point and masked."""
        fixed = to_fixed(change, len(self.parties), bound, client)
        party = self.parties[client]
        return {MASKED: party.mask(fixed, self.publics)}
