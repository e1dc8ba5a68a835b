"""The server's side of one round of secure aggregation: who is still there, what each is told, and the
sum.

It passes keys, shares and questions on, and gets at the end what takes the masks out of the sum of
those who sent an update. Who is missing at an exchange is left out of the next, down to the job's
threshold; below it the round ends, before anybody was asked to open anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from fedgrove.secure import keys, shamir
from fedgrove.secure.fixed import Words
from fedgrove.secure.graph import degree, needed, ring
from fedgrove.secure.keys import SecureError
from fedgrove.secure.member import added, digest, pair, self_mask
from fedgrove.secure.messages import Advert, Mail, Opening, Parcels, Revealed, Roll, Terms

_DIGITS = set("0123456789abcdef")


class Gathering:
    """One round among the clients that were ``asked``."""

    def __init__(self, terms: Terms, asked: Sequence[str]):
        self.terms = terms
        self.least = max(needed(terms.threshold, len(asked)), terms.least)
        self.asked = len(asked)
        self.adverts: dict[str, Advert] = {}
        self.around: dict[str, list[str]] = {}  # each client's neighbours
        self.parcels: dict[str, Parcels] = {}

    # ------------------------------------------------------------------ what each is told
    def rolls(self, adverts: Mapping[str, Advert]) -> dict[str, Roll]:
        """After exchange 1, the keys that each client needs. Raises ``SecureError`` for too few."""
        self.adverts = {name: adverts[name] for name in sorted(adverts)}
        self._enough(self.adverts, "sent keys")
        size = len(self.adverts)
        neighbours = degree(size, self.terms.threshold, self.terms.neighbours)
        self.around = ring(list(self.adverts), neighbours, self.terms.attempt)
        found = {}
        for name, others in self.around.items():
            own = [self.adverts[each] for each in sorted([name, *others])]
            found[name] = Roll(self.terms.round, size, own)
        return found

    def mails(self, parcels: Mapping[str, Parcels]) -> dict[str, Mail]:
        """After exchange 2, the shares for each who sent its own. Raises ``SecureError`` for too few."""
        self.parcels = {name: parcels[name] for name in sorted(parcels)}
        self._enough(self.parcels, "sent shares")
        found = {}
        for name in self.parcels:
            locked = {}
            for sender in self.around[name]:
                if sender in self.parcels:
                    locked[sender] = self.parcels[sender].locked[name]
            found[name] = Mail(locked)
        return found

    def openings(self, present: Collection[str]) -> dict[str, Opening]:
        """After exchange 3, the question to each whose masked update is there. Raises ``SecureError``
        for too few.
        """
        self._enough(present, "sent an update")
        found = {}
        for name in sorted(present):
            sharers = [each for each in self.around[name] if each in self.parcels]
            near = sorted([name, *sharers])
            here = [each for each in near if each in present]
            gone = [each for each in near if each not in present]
            found[name] = Opening(self.terms.round, here, gone)
        return found

    # ------------------------------------------------------------------ what of an answer is none
    def advert_fault(self, name: str, advert: Advert) -> str | None:
        """A clause on what is wrong with a client's keys, or None."""
        if advert.name != name:
            return "its keys are under another name"
        for part in _parts(advert):
            if len(part) != 64 or not _hexadecimal(part):
                return "its keys are none"
        return None

    def parcels_fault(self, name: str, parcels: Parcels) -> str | None:
        """A clause on what is wrong with the shares that a client sent, or None."""
        if set(parcels.locked) != set(self.around[name]):
            return "its shares are not for its neighbours"
        for share in parcels.locked.values():
            if len(share) >= 500 or not _hexadecimal(share):
                return "its shares are none"
        return None

    # ------------------------------------------------------------------ the sum
    def total(
        self,
        masked: Mapping[str, Words],
        revealed: Mapping[str, Revealed],
        reasons: Mapping[str, str] | None = None,
    ) -> Words:
        """The sum of the vectors ``[count]`` of all in ``masked``. Raises ``SecureError`` where too few
        answered, with the ``reasons`` of the others, or where shares do not fit.
        """
        self._enough(revealed, "helped to open the sum", reasons or {})
        first = next(iter(masked.values()))
        total: Words = np.zeros(len(first), dtype=np.uint32)
        for vector in masked.values():
            total = total + vector
        for name in masked:
            key = self_mask(self._seed(name, revealed))
            total = total - keys.mask(key, len(total))
        for name in sorted(set(self.parcels) - set(masked)):
            total = self._without(total, name, masked, revealed)
        return total

    def _without(
        self,
        total: Words,
        gone: str,
        masked: Mapping[str, Words],
        revealed: Mapping[str, Revealed],
    ) -> Words:
        """The sum less what its neighbours masked with a client whose update never came."""
        near = [each for each in self.around[gone] if each in masked]
        if not near:
            return total
        key = self._key(gone, revealed)
        for name in near:
            purpose = pair(self.terms, gone, name)
            agreed = keys.agreed(key, self.adverts[name].mask, purpose)
            stream = keys.mask(agreed, len(total))
            # what the one who is gone would have added
            total = added(total, stream, gone, name)
        return total

    def _seed(self, name: str, revealed: Mapping[str, Revealed]) -> str:
        shares = {}
        for holder, found in revealed.items():
            shares[holder] = found.seeds.get(name, "")
        for seed in self._joined(name, shares):
            if digest(seed) == self.adverts[name].seed:
                return seed
        raise self._unfit(name)

    def _key(self, name: str, revealed: Mapping[str, Revealed]) -> str:
        shares = {}
        for holder, found in revealed.items():
            shares[holder] = found.keys.get(name, "")
        for key in self._joined(name, shares):
            if keys.public_of(key) == self.adverts[name].mask:
                return key
        raise self._unfit(name)

    def _joined(self, name: str, shares: Mapping[str, str]) -> Iterator[str]:
        """What the shares of one secret give: of several where there are more than it takes, because
        one of them may be wrong.
        """
        holders = sorted([name, *self.around[name]])
        least = needed(self.terms.threshold, len(holders))
        places = {}
        for place, holder in enumerate(holders, start=1):
            share = shares.get(holder, "")
            if share and len(share) == 2 * shamir.WIDTH and _hexadecimal(share):
                places[place] = int(share, 16)
        if len(places) < least:
            raise SecureError(
                f"The sum of round {self.terms.round} stays closed, because {len(places)} of the "
                f"{least} neighbours of {name} that it takes gave their shares; nothing was "
                "learnt. Go on with --resume."
            )
        numbers = list(places)
        for start in range(len(numbers) - least + 1):
            few = numbers[start : start + least]
            chosen = {place: places[place] for place in few}
            secret = shamir.join(chosen)
            if secret < 1 << 256:
                yield f"{secret:064x}"

    def _unfit(self, name: str) -> SecureError:
        return SecureError(
            f"The sum of round {self.terms.round} stays closed, because the shares of {name}'s secret "
            "do not fit together: a client altered one; nothing was learnt. Go on with --resume."
        )

    def _enough(
        self,
        present: Collection[str],
        did: str,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        if len(present) >= self.least:
            return
        why = ""
        if reasons:
            said = [f"{name}: {reason}" for name, reason in sorted(reasons.items())]
            why = f" ({'; '.join(said)})"
        raise SecureError(
            f"Round {self.terms.round} ends without a sum: {len(present)} of {self.asked} clients "
            f"{did}{why}, and privacy.threshold = {self.terms.threshold:.3g} asks for {self.least}; "
            "nothing was learnt of anybody. Go on with --resume."
        )


def _parts(advert: Advert) -> list[str]:
    return [advert.lock, advert.mask, advert.seed]


def _hexadecimal(text: str) -> bool:
    return set(text) <= _DIGITS
