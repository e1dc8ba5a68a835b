"""What passes between a member and the server in a round: four exchanges.

====================  =========================  ==================================
exchange              down                       up
====================  =========================  ==================================
1 ``keys``            nothing                    ``Advert``
2 ``shares``          ``Roll``                   ``Parcels``
3 the masked update   ``Mail`` with the offer    a vector modulo 2^32
4 ``unmask``          ``Opening``                ``Revealed``
====================  =========================  ==================================

All are records of plain values, which the wire's own encoding writes (``adapters.tree``); bytes are
hexadecimal digits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Terms:
    """What all members of a round agree on before it. Only ``run`` and ``attempt`` are the server's word;
    the job says the rest.
    """

    run: str
    round: int
    attempt: str  # at the round, which may be repeated: keys are new in each
    threshold: float  # the share of clients that must answer
    neighbours: int | None = None  # of each client; None: as few as will do (``graph.degree``)
    least: int = 2  # clients, below which nobody takes part


@dataclass(frozen=True)
class Advert:
    """A member's public keys for one round, signed by its own key."""

    name: str
    lock: str  # X25519: shares for it are encrypted with this
    mask: str  # X25519: its pairwise masks come of this
    seed: str  # SHA-256 of its self-mask's seed, so that a wrong one is noticed
    signature: str

    def text(self, terms: Terms) -> bytes:
        """What is signed: it means nothing in another run, round or attempt."""
        keys = [self.lock, self.mask, self.seed]
        return purpose("keys", terms, self.name, *keys).encode()


@dataclass(frozen=True)
class Roll:
    """The keys of a member's neighbourhood, its own among them; ``size``: clients of the whole round."""

    round: int
    size: int
    adverts: list[Advert]


@dataclass(frozen=True)
class Parcels:
    """Shares of a member's two secrets, one parcel for each neighbour, locked for it alone."""

    locked: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Mail:
    """The parcels for a member, by who sent them; with those it masks."""

    locked: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Opening:
    """Of a member's neighbourhood: whose masked update arrived, itself among them, and whose did not."""

    round: int
    present: list[str]
    gone: list[str]


@dataclass(frozen=True)
class Revealed:
    """Shares of the self-masks of those present, and of the keys of those gone: never both of one."""

    seeds: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def purpose(
    what: str,
    terms: Terms,
    *words: str,
) -> str:
    """What a signature or a key is for, so that it serves for nothing else."""
    return json.dumps(["fedgrove", what, terms.run, terms.round, terms.attempt, *words])
