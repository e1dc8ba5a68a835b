"""Who signs the keys of a round, and whose signatures count: names that a client knows by itself, not
from the server.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        ECDSA,
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )


class Identity(Protocol):
    """What a member of a round signs with, and what it holds others' signatures against."""

    def sign(self, message: bytes) -> str:
        """A signature, as hexadecimal digits."""

    def knows(self, name: str) -> bool:
        """Whether there is a key for that name."""

    def signed(
        self,
        name: str,
        message: bytes,
        signature: str,
    ) -> bool:
        """Whether the client of that name signed the message."""


class NodeKeys:
    """A site's: its own node key, and the public ones that it was given (ECDSA on P-384, as Flower's
    SuperNodes have them).
    """

    def __init__(
        self, private: EllipticCurvePrivateKey, publics: Mapping[str, EllipticCurvePublicKey]
    ):
        self.private, self.publics = private, dict(publics)

    def sign(self, message: bytes) -> str:
        return self.private.sign(message, _ecdsa()).hex()

    def knows(self, name: str) -> bool:
        return name in self.publics

    def signed(
        self,
        name: str,
        message: bytes,
        signature: str,
    ) -> bool:
        from cryptography.exceptions import InvalidSignature

        if name not in self.publics:
            return False
        try:
            self.publics[name].verify(bytes.fromhex(signature), message, _ecdsa())
        except (InvalidSignature, ValueError):
            return False
        return True


class OfTheRun:
    """A simulated client's: whoever has the run's key can sign for it. The same steps, and no
    protection from the simulation itself.
    """

    def __init__(self, run: str, name: str):
        self.run, self.name = run, name

    def sign(self, message: bytes) -> str:
        return self._of(self.name, message)

    def knows(self, name: str) -> bool:
        return True

    def signed(
        self,
        name: str,
        message: bytes,
        signature: str,
    ) -> bool:
        return hmac.compare_digest(self._of(name, message), signature)

    def _of(self, name: str, message: bytes) -> str:
        return hmac.digest(self.run.encode(), name.encode() + b"\x1f" + message, "sha256").hex()


def _ecdsa() -> ECDSA:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    return ECDSA(hashes.SHA384())
