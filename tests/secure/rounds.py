"""Whole rounds in a process, in which clients go away before any exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fedgrove.adapters.tree import pack, typed, unpack
from fedgrove.secure.fixed import Words
from fedgrove.secure.gathering import Gathering
from fedgrove.secure.identity import OfTheRun
from fedgrove.secure.member import Participant
from fedgrove.secure.messages import Mail, Opening, Parcels, Revealed, Roll, Terms

EXCHANGES = ("keys", "shares", "update", "unmask")
Record = TypeVar("Record")


def terms(threshold: float = 2 / 3, **more: object) -> Terms:
    return Terms("run", 1, "attempt", threshold, **more)  # type: ignore[arg-type]


def names(count: int) -> list[str]:
    return [f"c{number:05d}" for number in range(count)]


def vectors(clients: Sequence[str], count: int = 50) -> dict[str, Words]:
    draw = np.random.default_rng(5)
    return {name: draw.integers(0, 1000, count).astype(np.uint32) for name in clients}


@dataclass
class Round:
    """``lost``: before which exchange a client goes away. ``bytes``: what each sent and was sent."""

    clients: Sequence[str]
    terms: Terms = field(default_factory=terms)
    lost: Mapping[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    masked: dict[str, Words] = field(default_factory=dict)

    def run(self, given: Mapping[str, Words]) -> Words:
        """The sum of those who lasted to the third exchange. Raises ``SecureError``."""
        terms, gathering = self.terms, Gathering(self.terms, self.clients)
        members = {
            name: Participant.begin(terms, name, OfTheRun(terms.run, name))
            for name in self.here("keys")
        }
        self.members, self.gathering = members, gathering
        adverts = {name: self.sent(name, each.memory.advert) for name, each in members.items()}
        rolls = gathering.rolls(adverts)
        parcels = {
            name: self.sent(name, members[name].share(self.sent(name, rolls[name])))
            for name in self.here("shares")
        }
        mails = gathering.mails(parcels)
        for name in self.here("update"):
            self.masked[name] = members[name].mask(self.sent(name, mails[name]), given[name])
        openings = gathering.openings(self.masked)
        revealed = {
            name: self.sent(name, members[name].reveal(self.sent(name, openings[name])))
            for name in self.here("unmask")
        }
        return gathering.total(self.masked, revealed)

    def here(self, exchange: str) -> list[str]:
        until = EXCHANGES.index(exchange)
        return [
            name
            for name in self.clients
            if name not in self.lost or EXCHANGES.index(self.lost[name]) > until
        ]

    def sent(self, name: str, record: Record) -> Record:
        """The record as it arrives on the other side of the wire."""
        blob = pack(record)
        self.bytes[name] = self.bytes.get(name, 0) + len(blob)
        return typed(type(record), unpack(blob))


def plain_sum(given: Mapping[str, Words], clients: Sequence[str]) -> Words:
    return sum((given[name] for name in clients), np.zeros_like(next(iter(given.values()))))


__all__ = ["Mail", "Opening", "Parcels", "Revealed", "Roll", "Round"]
