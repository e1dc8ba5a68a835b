"""The keys of one round: X25519 to agree, HKDF-SHA256 to derive, ChaCha20 for masks, with Poly1305 for
shares. Secrets and public halves are 32 bytes, written as hexadecimal digits.
"""

from __future__ import annotations

import secrets
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fedgrove.ground.errors import FedgroveError
from fedgrove.secure.fixed import Words

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey


class SecureError(FedgroveError):
    """One side of a secure aggregation does not go on with it."""


def new_secret() -> str:
    """32 bytes of the system's: an X25519 key, or the seed of a mask."""
    return secrets.token_hex(32)


def public_of(secret: str) -> str:
    """The public half of an X25519 key."""
    return _private(secret).public_key().public_bytes_raw().hex()


def agreed(
    secret: str,
    public: str,
    purpose: str,
) -> bytes:
    """The key that two sides have for ``purpose``, 32 bytes. Raises ``SecureError`` for a public half
    with which there is no secret.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        theirs = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        shared = _private(secret).exchange(theirs)
    except ValueError:
        raise SecureError(
            "A key of the round is none, so that nothing can be agreed with it."
        ) from None
    return derived(shared, purpose)


@lru_cache(maxsize=1)  # a member goes through its neighbours with one key
def _private(secret: str) -> X25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(bytes.fromhex(secret))


def derived(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose alone."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), 32, salt=None, info=purpose.encode()).derive(secret)


def mask(key: bytes, count: int) -> Words:
    """A stream of ``count`` numbers. The key serves this one stream, so its nonce may be zero."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(4 * count)), dtype="<u4").astype(np.uint32)


def locked(key: bytes, content: bytes) -> str:
    """Encrypted for who has the key, which serves this one message."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(bytes(12), content, None).hex()


def unlocked(key: bytes, content: str) -> bytes | None:
    """What ``locked`` was given; None where it was altered, or locked with another key."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), bytes.fromhex(content), None)
    except (InvalidTag, ValueError):
        return None
