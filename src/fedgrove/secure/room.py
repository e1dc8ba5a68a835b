"""All members of one round in this process: the same exchanges between them as between sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedgrove.secure.fixed import Words
from fedgrove.secure.gathering import Gathering
from fedgrove.secure.identity import OfTheRun
from fedgrove.secure.member import Participant
from fedgrove.secure.messages import Terms


class Room:
    """A round of simulated clients, of whom nobody is lost."""

    def __init__(self, terms: Terms, names: Sequence[str]):
        self.gathering = Gathering(terms, names)
        self.members: dict[str, Participant] = {}
        for name in names:
            identity = OfTheRun(terms.run, name)
            self.members[name] = Participant.begin(terms, name, identity)
        adverts = {name: member.memory.advert for name, member in self.members.items()}
        rolls = self.gathering.rolls(adverts)
        parcels = {name: member.share(rolls[name]) for name, member in self.members.items()}
        self.mails = self.gathering.mails(parcels)

    def mask(self, name: str, words: Words) -> Words:
        """A member's vector ``[count]`` as it leaves."""
        return self.members[name].mask(self.mails[name], words)

    def total(self, masked: Mapping[str, Words]) -> Words:
        """The sum of the masked vectors of all who are still there."""
        openings = self.gathering.openings(list(masked))
        revealed = {}
        for name, opening in openings.items():
            revealed[name] = self.members[name].reveal(opening)
        return self.gathering.total(masked, revealed)
