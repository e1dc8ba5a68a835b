"""The server's side of a round under masks, over messages: ``keys``, ``shares``, then training, whose
answer is a masked vector, then ``unmask`` (``fedgrove.secure``). A client that gives no answer is left
out of the next exchange.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fedgrove.adapters.tree import table, typed
from fedgrove.engines.flower.post import Failure
from fedgrove.engines.flower.wire import Note
from fedgrove.ground.errors import AdapterError
from fedgrove.methods.contract import ClientInfo, Update
from fedgrove.privacy.client_dp import travels
from fedgrove.privacy.masked import MASKED, Opened, terms, weighted
from fedgrove.runs.engine import Absence
from fedgrove.secure import fixed
from fedgrove.secure.gathering import Gathering
from fedgrove.secure.messages import Advert, Mail, Parcels, Revealed

if TYPE_CHECKING:
    from fedgrove.ground.plain import Given
    from fedgrove.job import Job
    from fedgrove.methods.contract import Method
    from fedgrove.methods.head import HeadPolicy

Record = TypeVar("Record")
#: (kind, head for each client) -> each one's answer, in any order
AskEach = Callable[[str, Mapping[str, dict[str, Any]]], "Answers"]
Answers = Iterator[tuple[str, Note | Failure]]


class MaskedRound:
    """One round among the clients that are asked."""

    def __init__(self, job: Job, run: str, method: Method, round: int, infos: Sequence[ClientInfo]):
        self.method, self.round = method, round
        self.names = [info.name for info in infos]
        self.terms = terms(job, run, round, secrets.token_hex(16))
        self.gathering = Gathering(self.terms, self.names)
        self.scale: int | None = None
        if weighted(method):
            self.scale = max(info.examples for info in infos)
        self.mails: dict[str, Mail] = {}  # of those who go on to train
        self._length: int | None = None  # numbers of a masked vector

    # ------------------------------------------------------------------ before the training
    def meet(self, ask: AskEach) -> Iterator[Absence]:
        """Exchanges 1 and 2; those who are lost in them. Raises ``SecureError`` where they are too
        many.
        """
        gathering = self.gathering
        asked = ask("keys", {name: self._head() for name in self.names})
        adverts = yield from _sound(asked, Advert, "advert", gathering.advert_fault)
        rolls = gathering.rolls(adverts)
        asked = ask("shares", {name: self._head(roll=table(roll)) for name, roll in rolls.items()})
        parcels = yield from _sound(asked, Parcels, "parcels", gathering.parcels_fault)
        self.mails = gathering.mails(parcels)

    def beside(self, name: str) -> dict[str, Any]:
        """What goes to a client with its offer."""
        return self._head(mail=table(self.mails[name]), scale=self.scale)

    def _head(self, **more: Any) -> dict[str, Any]:
        return {"round": self.round, "attempt": self.terms.attempt, **more}

    # ------------------------------------------------------------------ the masked updates
    def expect(self, method: Method, head: HeadPolicy, info: ClientInfo, offer: Given) -> None:
        """Every vector has as many numbers as travel from one client."""
        if self._length is None:
            behind = 0 if self.scale is None else 1
            self._length = travels(method, head, info, offer, self.round) + behind

    def fault(self, content: Given) -> str | None:
        """A clause on what is wrong with a masked update, or None."""
        vector = content.get(MASKED)
        if set(content) != {MASKED} or not isinstance(vector, Tensor):
            return "it is not masked"
        if vector.dtype != torch.int32 or vector.shape != (self._length,):
            return f"its masked vector has not the {self._length} numbers of the others"
        return None

    def opened(self, updates: Sequence[Update], ask: AskEach) -> Opened:
        """Exchange 4, and the sum. Raises ``SecureError`` where it stays closed."""
        masked = {each.client: fixed.from_tensor(each.content[MASKED]) for each in updates}
        openings = self.gathering.openings(masked)
        heads = {name: self._head(opening=table(each)) for name, each in openings.items()}
        revealed: dict[str, Revealed] = {}
        reasons: dict[str, str] = {}
        for name, answer in ask("unmask", heads):
            found = _record(Revealed, answer, "revealed")
            if isinstance(found, Revealed):
                revealed[name] = found
            else:
                reasons[name] = found
        steps = fixed.signed(self.gathering.total(masked, revealed, reasons))
        return Opened(steps, len(self.gathering.adverts), self.scale)


def _sound(
    answers: Answers,
    kind: type[Record],
    key: str,
    fault: Callable[[str, Record], str | None],
) -> Generator[Absence, None, dict[str, Record]]:
    """The answers that can be used, by client; yields those who gave none."""
    found: dict[str, Record] = {}
    for name, answer in answers:
        sent = _record(kind, answer, key)
        lost = sent if isinstance(sent, str) else fault(name, sent)
        if isinstance(sent, kind) and lost is None:
            found[name] = sent
        else:
            yield _absence(name, answer, str(lost))
    return found


def _record(kind: type[Record], answer: Note | Failure, key: str) -> Record | str:
    """What a client answered, or a clause on why that is none."""
    if isinstance(answer, Failure):
        return answer.reason
    try:
        return typed(kind, answer.head.get(key))
    except AdapterError as error:
        return f"its answer is none: {error}"


def _absence(name: str, answer: Note | Failure, reason: str) -> Absence:
    return Absence(name, reason, answer.trace if isinstance(answer, Failure) else "")
