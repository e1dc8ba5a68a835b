"""Shamir's secret sharing over a prime field: any ``threshold`` shares give the secret, fewer tell
nothing.

Shamir, "How to Share a Secret", Communications of the ACM 22 (1979). Ours, because what PyPI has does
not fit: ``shamirs`` takes 0.6 s to join 52 shares, PyCryptodome shares 16 bytes over GF(2^128) alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = (
    1 << 256
) + 297  # the smallest above 2^256, so that every 32 bytes are a number of the field
WIDTH = 33  # bytes of one share


def split(
    secret: int,
    holders: Sequence[int],
    threshold: int,
) -> dict[int, int]:
    """A share for each holder, which is a number from 1 on: fresh coefficients of the system's.

    Raises ``ValueError`` where the secret is no number of the field or the holders are too few.
    """
    if not 0 <= secret < PRIME:
        raise ValueError("the secret is no number of the field")
    if not 1 <= threshold <= len(set(holders)) or min(holders) < 1:
        raise ValueError(f"{len(set(holders))} holders cannot have a threshold of {threshold}")
    drawn = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return {x: value_at(x, [secret, *drawn], PRIME) for x in holders}


def value_at(
    x: int,
    coefficients: Sequence[int],
    prime: int,
) -> int:
    """The polynomial at ``x`` modulo ``prime``; its constant comes first."""
    total = 0
    for coefficient in reversed(coefficients):
        total = (total * x + coefficient) % prime
    return total


def join(shares: Mapping[int, int], prime: int = PRIME) -> int:
    """The polynomial's constant from its values at as many holders as it has coefficients."""
    total = 0
    for x, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != x:
                above = above * other % prime
                below = below * (other - x) % prime
        total = (total + share * above * pow(below, -1, prime)) % prime
    return total
