"""A client's side of one round of secure aggregation. It trusts no word of the server's that it can
check, and refuses with a sentence.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017), over
the sparse graph of Bell et al. (CCS 2020). A member masks its vector with a stream for each neighbour,
of which the sum over both sides is nothing, and with one of its own. Its neighbours hold shares of
both secrets. Of each other client it gives one kind of share and never the second, and of more than
half of the holders each secret takes one: so the server learns one of the two, and the update of
nobody. With a threshold of 2/3 this holds against a lying server with fewer than a third of the holders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fedgrove.secure import keys, shamir
from fedgrove.secure.fixed import Words
from fedgrove.secure.graph import degree, needed
from fedgrove.secure.identity import Identity
from fedgrove.secure.keys import SecureError
from fedgrove.secure.messages import Advert, Mail, Opening, Parcels, Revealed, Roll, Terms, purpose


@dataclass(frozen=True)
class Held:
    """Shares of one client's two secrets, as hexadecimal digits."""

    seed: str
    key: str


@dataclass(frozen=True)
class Memory:
    """What a member keeps between the exchanges of a round, and tells nobody. A step that was taken is
    not taken again with something else.
    """

    terms: Terms
    advert: Advert
    lock: str
    key: str
    seed: str
    roll: Roll | None = None
    parcels: Parcels = field(default_factory=Parcels)
    mail: Mail | None = None
    held: dict[str, Held] = field(
        default_factory=dict
    )  # by whose secrets they are, its own among them
    masked: str = ""  # SHA-256 of the vector that it masked
    opening: Opening | None = None


class Participant:
    """One client in one round; ``memory`` changes with each exchange."""

    def __init__(self, identity: Identity, memory: Memory):
        self.identity, self.memory = identity, memory

    @classmethod
    def begin(
        cls,
        terms: Terms,
        name: str,
        identity: Identity,
    ) -> Participant:
        """Exchange 1: new keys."""
        lock = keys.new_secret()
        key = keys.new_secret()
        seed = keys.new_secret()
        advert = Advert(
            name,
            keys.public_of(lock),
            keys.public_of(key),
            digest(seed),
            "",
        )
        advert = replace(advert, signature=identity.sign(advert.text(terms)))
        return cls(identity, Memory(terms, advert, lock, key, seed))

    @property
    def name(self) -> str:
        return self.memory.advert.name

    @property
    def size(self) -> int:
        """Clients of the round."""
        return self._roll().size

    # ------------------------------------------------------------------ exchange 2
    def share(self, roll: Roll) -> Parcels:
        """Shares of its secrets for its neighbours. Raises ``SecureError`` for a list of keys that is
        not signed by names that it knows.
        """
        memory = self.memory
        if memory.roll is not None:
            if roll != memory.roll:
                raise self._refusal("the server shows a second list of keys for one round")
            return memory.parcels
        self._check(roll)
        owners = sorted(advert.name for advert in roll.adverts)
        shares = self._split(owners)
        locked = {}
        for advert in roll.adverts:
            if advert.name != self.name:
                held = shares[advert.name]
                lock = self._lock(advert, self.name, advert.name)
                locked[advert.name] = keys.locked(lock, bytes.fromhex(held.seed + held.key))
        parcels = Parcels(locked)
        own = {self.name: shares[self.name]}
        self.memory = replace(memory, roll=roll, parcels=parcels, held=own)
        return parcels

    def _check(self, roll: Roll) -> None:
        terms = self.memory.terms
        names = [advert.name for advert in roll.adverts]
        if roll.round != terms.round:
            raise self._refusal(f"the list of keys is of round {roll.round}, not of {terms.round}")
        if len(set(names)) < len(names):
            raise self._refusal("the list of keys has one name twice")
        if self.memory.advert not in roll.adverts:
            raise self._refusal("the list of keys has others in place of its own")
        least = max(2, terms.least)
        if roll.size < least:
            raise self._refusal(
                f"the round has {roll.size} clients, where at least {least} hide each other"
            )
        neighbours = degree(roll.size, terms.threshold, terms.neighbours)
        if len(names) != neighbours + 1:
            raise self._refusal(
                f"the list has the keys of {len(names)} clients, where a round of {roll.size} gives "
                f"each {neighbours} neighbours"
            )
        for advert in roll.adverts:
            self._check_signature(advert)

    def _check_signature(self, advert: Advert) -> None:
        if not self.identity.knows(advert.name):
            raise self._refusal(
                f"the list of keys names {advert.name!r}, whose key it does not know"
            )
        text = advert.text(self.memory.terms)
        if not self.identity.signed(advert.name, text, advert.signature):
            raise self._refusal(
                f"the keys of {advert.name!r} are not signed by it for this round: somebody changed "
                "them, or they are of another round"
            )

    def _split(self, owners: Sequence[str]) -> dict[str, Held]:
        """Shares of both secrets, by holder."""
        threshold = needed(self.memory.terms.threshold, len(owners))
        places = list(range(1, len(owners) + 1))
        seeds = shamir.split(int(self.memory.seed, 16), places, threshold)
        private = shamir.split(int(self.memory.key, 16), places, threshold)
        found = {}
        for place, holder in zip(places, owners, strict=True):
            found[holder] = Held(written(seeds[place]), written(private[place]))
        return found

    # ------------------------------------------------------------------ exchange 3
    def mask(self, mail: Mail, words: Words) -> Words:
        """The vector ``[count]`` as it leaves: uniform to all who lack its secrets. Raises
        ``SecureError`` for a second vector.
        """
        memory = self.memory
        own = hashlib.sha256(words.tobytes()).hexdigest()
        if memory.mail is not None and (mail, own) != (memory.mail, memory.masked):
            raise self._refusal("the server asks for a second update under the masks of one round")
        others = self._neighbours(mail)
        held = dict(memory.held)
        for advert in others:
            held[advert.name] = self._opened(advert, mail)
        own_stream = keys.mask(self_mask(memory.seed), len(words))
        total = words + own_stream
        for advert in others:
            purpose_of_pair = pair(memory.terms, self.name, advert.name)
            key = keys.agreed(memory.key, advert.mask, purpose_of_pair)
            stream = keys.mask(key, len(words))
            total = added(total, stream, self.name, advert.name)
        self.memory = replace(memory, mail=mail, held=held, masked=own)
        return total

    def _neighbours(self, mail: Mail) -> list[Advert]:
        """Those whose parcels came. Raises ``SecureError`` where they are too few."""
        roll = self._roll()
        others = {advert.name for advert in roll.adverts} - {self.name}
        if not set(mail.locked) <= others:
            raise self._refusal("it is sent shares of clients that are not its neighbours")
        least = needed(self.memory.terms.threshold, len(roll.adverts))
        if len(mail.locked) + 1 < least:
            raise self._refusal(
                f"{len(mail.locked) + 1} of {len(roll.adverts)} clients gave shares, and {least} "
                "must"
            )
        return [advert for advert in roll.adverts if advert.name in mail.locked]

    def _opened(self, advert: Advert, mail: Mail) -> Held:
        lock = self._lock(advert, advert.name, self.name)
        found = keys.unlocked(lock, mail.locked[advert.name])
        if found is None or len(found) != 2 * shamir.WIDTH:
            raise self._refusal(
                f"the shares that {advert.name!r} sent cannot be opened: they were altered on the way"
            )
        seed, key = found[: shamir.WIDTH], found[shamir.WIDTH :]
        return Held(seed.hex(), key.hex())

    def _lock(
        self,
        other: Advert,
        sender: str,
        receiver: str,
    ) -> bytes:
        what = purpose("shares", self.memory.terms, sender, receiver)
        return keys.agreed(self.memory.lock, other.lock, what)

    # ------------------------------------------------------------------ exchange 4
    def reveal(self, opening: Opening) -> Revealed:
        """What takes the masks out of the sum, and out of nothing else. Raises ``SecureError`` for a
        question that would show more.
        """
        memory = self.memory
        if memory.opening is not None and opening != memory.opening:
            raise self._refusal(
                "the server asks a second time, and with other names, for one round"
            )
        self._check_opening(opening)
        self.memory = replace(memory, opening=opening)
        seeds = {name: memory.held[name].seed for name in opening.present}
        private = {name: memory.held[name].key for name in opening.gone}
        return Revealed(seeds, private)

    def _check_opening(self, opening: Opening) -> None:
        memory, roll = self.memory, self._roll()
        if opening.round != memory.terms.round:
            raise self._refusal(
                f"it is asked about round {opening.round}, not {memory.terms.round}"
            )
        if memory.mail is None:
            raise self._refusal("it has sent no masked update that could be part of the sum")
        if both := sorted(set(opening.present) & set(opening.gone)):
            raise self._refusal(
                f"the server asks for both secrets of {both[0]!r}, which would show its update"
            )
        if self.name not in opening.present:
            raise self._refusal("the server asks to open a sum without it, after its update left")
        if unknown := sorted({*opening.present, *opening.gone} - set(memory.held)):
            raise self._refusal(f"it is asked for shares of {unknown[0]!r}, of whom it has none")
        least = needed(memory.terms.threshold, len(roll.adverts))
        there = len(set(opening.present))
        if there < least:
            raise self._refusal(
                f"{there} of {len(roll.adverts)} updates are there, and the job "
                f"opens no sum of fewer than {least}"
            )

    def _roll(self) -> Roll:
        if self.memory.roll is None:
            raise self._refusal("it has seen no list of keys in this round")
        return self.memory.roll

    def _refusal(self, why: str) -> SecureError:
        return SecureError(f"{self.name} takes no further part in the round, because {why}.")


def digest(seed: str) -> str:
    """What a member says of its self-mask beforehand."""
    return hashlib.sha256(bytes.fromhex(seed)).hexdigest()


def self_mask(seed: str) -> bytes:
    """The key of a member's own stream."""
    return keys.derived(bytes.fromhex(seed), "fedgrove self-mask")


def pair(
    terms: Terms,
    one: str,
    other: str,
) -> str:
    """What the key of a pair's stream is for."""
    return purpose("mask", terms, *sorted([one, other]))


def added(
    total: Words,
    stream: Words,
    whose: str,
    other: str,
) -> Words:
    """A pair's stream in the vector of one of the two: what one adds the other subtracts."""
    if whose < other:
        return total + stream  # uint32: modulo 2^32
    return total - stream


def written(share: int) -> str:
    """A share as it travels."""
    return share.to_bytes(shamir.WIDTH, "big").hex()
