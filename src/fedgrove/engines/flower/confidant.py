"""A client's part in rounds under masks, over messages. What it must remember between them is on its own
disk, so that it may die and come back between any two, and so that the same message has the same answer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedgrove.adapters.tree import typed
from fedgrove.engines.flower.wire import Note
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.ground.files import write_text
from fedgrove.privacy.client_dp import change
from fedgrove.privacy.masked import MASKED, Addition, noise_key, terms, weighted
from fedgrove.secure import fixed
from fedgrove.secure.keys import SecureError
from fedgrove.secure.member import Memory, Participant
from fedgrove.secure.messages import Mail, Opening, Roll

if TYPE_CHECKING:
    from torch import Tensor

    from fedgrove.ground.plain import Given
    from fedgrove.job import Job
    from fedgrove.methods.contract import ClientInfo, Update
    from fedgrove.secure.identity import Identity
    from fedgrove.training.client import ClientHalf

Record = TypeVar("Record")


class Confidant:
    """One client in one run. ``simulated``: it trusts its simulation, which may repeat rounds."""

    def __init__(
        self, home: Path, job: Job, info: ClientInfo, identity: Identity, *, simulated: bool
    ):
        self.home, self.job, self.info = home, job, info
        self.identity, self.simulated = identity, simulated
        self.memory = home / "masks.json"  # of the newest round: nobody else may read it
        self.sums = (
            home / "opened.json"
        )  # round -> a digest of whose sum this client helped to open

    # ------------------------------------------------------------------ the exchanges
    def keys(self, note: Note) -> Note:
        """New keys for a new attempt at a round."""
        agreed = terms(
            self.job, str(note.head["run"]), _round(note), str(note.head["attempt"])[:64]
        )
        known = self._remembered()
        if known is not None and known.terms == agreed:
            return Note("keys", {"advert": asdict(known.advert)})
        member = Participant.begin(agreed, self.info.name, self.identity)
        self._remember(member)
        return Note("keys", {"advert": asdict(member.memory.advert)})

    def shares(self, note: Note) -> Note:
        member = self._member(note)
        roll = _read(Roll, note, "roll")
        self._sees_who_shares_the_noise(roll)
        parcels = member.share(roll)
        self._remember(member)
        return Note("shares", {"parcels": asdict(parcels)})

    def masked(
        self, note: Note, half: ClientHalf, update: Update, offer: Given
    ) -> dict[str, Tensor]:
        """What is sent in place of an update: its masked words, int32 [count]."""
        member, mail = self._member(note), _read(Mail, note, "mail")
        round, scale = _round(note), note.head.get("scale")
        if isinstance(scale, int) != weighted(half.method):
            raise RunError("The server does not weigh clients as the job says.")
        own = change(half.method, half.head, self.info, update.content, offer, round)
        addition = Addition(self.info.name, round, own, self.info.examples, scale)
        key = noise_key(self.job, self.home)
        words = member.mask(mail, addition.words(self.job.privacy, member.size, key))
        self._remember(member)
        return {MASKED: fixed.to_tensor(words)}

    def unmask(self, note: Note) -> Note:
        member, opening = self._member(note), _read(Opening, note, "opening")
        revealed = member.reveal(opening)
        self._open_once(opening)
        self._remember(member)
        return Note("unmask", {"revealed": asdict(revealed)})

    def forget(self) -> None:
        """The secrets of the last round, once the run is over."""
        self.memory.unlink(missing_ok=True)

    # ------------------------------------------------------------------ what it does not do
    def _sees_who_shares_the_noise(self, roll: Roll) -> None:
        """Its share of the noise depends on how many there are: a site counts them itself."""
        if self.job.privacy.client_noise and not self.simulated and roll.size > len(roll.adverts):
            raise SecureError(
                f"{self.info.name} takes no further part in the round, because it sees the keys of "
                f"{len(roll.adverts)} of {roll.size} clients, and can count on no others for their "
                "share of privacy.client_noise; leave privacy.neighbours out."
            )

    def _open_once(self, opening: Opening) -> None:
        """A round that is repeated with others would show what these others sent, by the difference."""
        if self.simulated:
            return
        names = hashlib.sha256(json.dumps(sorted(opening.present)).encode()).hexdigest()
        known: dict[str, str] = {}
        if self.sums.exists():
            known = json.loads(self.sums.read_text(encoding="utf-8"))
        if known.get(str(opening.round), names) != names:
            raise SecureError(
                f"{self.info.name} helped to open the sum of round {opening.round} before, with "
                "other clients in it, and the difference of the two would show an update; bring the "
                "same clients back, or start a new run."
            )
        write_text(self.sums, json.dumps({**known, str(opening.round): names}) + "\n")

    # ------------------------------------------------------------------ its memory
    def _member(self, note: Note) -> Participant:
        known = self._remembered()
        asked = (str(note.head["run"]), _round(note), str(note.head.get("attempt"))[:64])
        if known is None or (known.terms.run, known.terms.round, known.terms.attempt) != asked:
            raise SecureError(
                f"{self.info.name} has no keys for this attempt at round {_round(note)}: it was asked "
                "for none, or for others since."
            )
        return Participant(self.identity, known)

    def _remembered(self) -> Memory | None:
        try:
            return typed(Memory, json.loads(self.memory.read_text(encoding="utf-8")))
        except (OSError, ValueError, AdapterError):
            return None  # then it has no keys, and says so

    def _remember(self, member: Participant) -> None:
        write_text(self.memory, json.dumps(asdict(member.memory)), private=True)


def _round(note: Note) -> int:
    round = note.head.get("round")
    if not isinstance(round, int) or isinstance(round, bool):
        raise RunError("The server does not say which round it is.")
    return round


def _read(kind: type[Record], note: Note, key: str) -> Record:
    found: Any = note.head.get(key)
    if found is None:
        raise SecureError(
            f"The server's message has no {key}, and the job's updates leave under masks alone."
        )
    return typed(kind, found)
