"""The engine whose clients train at the nodes of a Flower grid. All state of clients is theirs.

Of a client the server keeps its node, and the round of its last update that was used: the client starts from its
private store of that round, whatever happened since (``stores``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.engines.base import Absence, Arrival, Ask, Leaving, OfferOf
from fedgrove.engines.flower.post import Failure, Post
from fedgrove.engines.flower.validate import fault
from fedgrove.engines.flower.wire import Note
from fedgrove.methods.contract import ClientInfo, Method, Update
from fedgrove.tree import numbers
from fedgrove.wire.compress import sent_bytes

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.training.head import HeadPolicy

GREETING = 900.0  # seconds for a node to read its data and to load the model
AGAIN = 60.0  # seconds before a node that refused is asked again

_Ask = tuple[str, dict[str, Any], dict[str, Any]]  # kind, head, body
Told = Callable[[int, str, str, str], None]  # (round, client, what, reason): for the log


@dataclass(frozen=True)
class Member:
    """A client that said hello."""

    name: str
    node: int
    row: dict[str, Any]  # as in federation.json
    rank: int | None  # the largest that it affords

    @property
    def examples(self) -> int:
        return int(self.row["train"])


@dataclass(frozen=True)
class _Sent:
    client: str
    round: int
    down: int
    bytes_down: int


class FlowerEngine:
    """``simulation``: paths for simulated clients, None for real ones; ``names``: whose key each node has, if known."""

    def __init__(
        self,
        post: Post,
        key: str,
        job: Job,
        *,
        simulation: dict[str, str] | None = None,
        names: Mapping[int, str] | None = None,
    ):
        self.post, self.key, self.job, self.simulation = post, key, job, simulation
        self.names = dict(names or {})
        self.patience, self.late, self.least = (
            job.federation.deadline,
            job.federation.late,
            job.federation.min_clients,
        )
        self.told: Told = lambda round, client, what, reason: None
        self.members: dict[str, Member] = {}
        self.infos: dict[str, ClientInfo] = {}
        self.held_out: set[str] = set()
        self._stores: dict[str, int] = {}  # round of each client's store
        self._before: dict[str, int] = {}
        self._kept: dict[str, int] = {}  # as _stores, at the last checkpoint
        self._overdue: dict[str, _Sent] = {}  # messages without an answer at the deadline, where late ones count
        self._refused: dict[int, tuple[float, str]] = {}
        self._method: Method | None = None
        self._head: HeadPolicy | None = None

    @property
    def trusted(self) -> bool:
        return self.simulation is not None

    # ------------------------------------------------------------------ who is there
    def introduce(self) -> list[Member]:
        """Ask every node that is not known who it is; those that answer with a name of their own."""
        known = {member.node for member in self.members.values()}
        now = time.monotonic()
        nodes = [
            node
            for node in self.post.nodes()
            if node not in known and now - self._refused.get(node, (-AGAIN, ""))[0] >= AGAIN
        ]
        import fedgrove

        head = {"job": self.job.to_toml(), "version": fedgrove.__version__}
        found = []
        for node, answer in self._ask(dict.fromkeys(nodes, ("hello", head, {})), seconds=GREETING):
            if isinstance(answer, Failure):
                self._turn_away(node, f"node {node}", answer.reason)
                continue
            row = answer.head.get("row")
            if (
                not isinstance(row, dict)
                or not isinstance(row.get("name"), str)
                or not isinstance(row.get("train"), int)
            ):
                self._turn_away(node, f"node {node}", "its hello does not say who it is")
                continue
            if self.names and self.names.get(node) != row["name"]:
                whose = f"the key of {self.names[node]!r}" if node in self.names else "a key that belongs to no site"
                self._turn_away(node, row["name"], f"its node has {whose}")
                continue
            rank = answer.head.get("rank")
            member = Member(row["name"], node, row, rank if isinstance(rank, int) else None)
            before = self.members.get(member.name)
            if before is not None and before.node in self.post.nodes():
                self._turn_away(node, member.name, "another node with this name is connected")
                continue
            self.members[member.name] = member
            found.append(member)
        return sorted(found, key=lambda member: member.name)

    def open(self, infos: Sequence[ClientInfo]) -> dict[str, str]:
        """Tell clients who they are; each loads the model. Those that cannot, with the reason, are forgotten."""
        head = {"job": self.job.to_toml()}
        asked: dict[int, _Ask] = {
            self.members[info.name].node: (
                "open",
                {**head, "client": {"name": info.name, "rank": info.rank, "examples": info.examples}},
                {},
            )
            for info in infos
        }
        named = {self.members[info.name].node: info for info in infos}
        failed = {}
        for node, answer in self._ask(asked, seconds=GREETING):
            info = named[node]
            if isinstance(answer, Failure):
                failed[info.name] = answer.reason
                self.members.pop(info.name)
                self._turn_away(node, info.name, answer.reason)
            else:
                self.infos[info.name] = info
        return failed

    def settle(self, method: Method, head: HeadPolicy, held_out: Sequence[str]) -> None:
        """What the server's side checks updates against."""
        self._method, self._head, self.held_out = method, head, set(held_out)

    def joined(self, round: int) -> list[ClientInfo]:
        if self.trusted:
            return []
        back = [self.infos[member.name] for member in self.introduce() if member.name in self.infos]
        new = [
            ClientInfo(member.name, self._rank(member), member.examples)
            for member in sorted(self.members.values(), key=lambda member: member.name)
            if member.name not in self.infos
        ]
        failed = self.open([*back, *new])
        for info in back:
            if info.name not in failed:
                self.told(round, info.name, "back", "it is connected again")
        return [info for info in new if info.name not in failed]

    def refuse(self, client: str, reason: str) -> None:
        member = self.members.pop(client)
        self.infos.pop(client, None)
        self._refused[member.node] = (float("inf"), reason)

    def available(self, clients: Sequence[str]) -> list[str]:
        """Those connected and not still at work; where too few are, it waits for them as long as a round may take."""
        until = None if self.patience is None else time.monotonic() + self.patience
        while True:
            online = set(self.post.nodes())
            busy = {sent.client for sent in self._overdue.values()}
            here = [
                name
                for name in clients
                if name in self.members and self.members[name].node in online and name not in busy
            ]
            if len(here) >= min(self.least, len(clients)) or (until is not None and time.monotonic() >= until):
                return here
            if self._overdue:
                self._late_ones()
            time.sleep(min(self.post.slowest, 0.5))
            self.open([self.infos[member.name] for member in self.introduce() if member.name in self.infos])

    # ------------------------------------------------------------------ rounds
    def train(self, round: int, clients: Sequence[str], offer: OfferOf) -> Iterator[Arrival | Absence]:
        waiting, self._overdue = self._overdue, {}
        needed = set()
        # A message may be read only as long as its answer can be used.
        lifetime = None if self.patience is None else self.patience * (3 if self.late == "next" else 1) + 1
        for name in clients:
            given = offer(name)
            bytes_down = sent_bytes(given, self.job.run.compress)
            head = {"round": round, "store": self._stores.get(name, 0), "keep": self._kept.get(name, 0)}
            sent = self._send(name, "train", head, {"offer": dict(given)}, seconds=lifetime)
            if not sent:
                yield Absence(name, "its node is not connected any more")
                continue
            waiting[sent] = _Sent(name, round, numbers(given), bytes_down)
            needed.add(sent)
        for sent, answer in self.post.collect(list(waiting), needed=needed, seconds=self.patience):
            yield self._arrival(waiting.pop(sent), answer)
        for sent, asked in waiting.items():
            if asked.round == round:
                yield Absence(asked.client, f"it has not answered within {self.patience:g} s")
            if self.late == "next":
                self._overdue[sent] = asked

    def _arrival(self, sent: _Sent, answer: Note | Failure) -> Arrival | Absence:
        name = sent.client
        if isinstance(answer, Failure):
            return Absence(name, answer.reason, answer.trace)
        head, content = answer.head, answer.body.get("update")
        loss, steps, trained, seconds = (head.get(key) for key in ("loss", "steps", "trained", "seconds"))
        if not (
            isinstance(content, dict)
            and isinstance(loss, float)
            and isinstance(steps, int)
            and isinstance(trained, int)
            and isinstance(seconds, float)
        ):
            return Absence(name, "its answer is no update")
        assert self._method is not None
        assert self._head is not None
        info = self.infos[name]
        wrong = fault(content, method=self._method, client=info, round=sent.round, head=self._head.initial)
        if wrong:
            return Absence(name, f"its update is refused, because {wrong}")
        self._before[name] = self._stores.get(name, 0)
        self._stores[name] = sent.round
        return Arrival(
            update=Update(name, info.examples, content),
            round=sent.round,
            loss=loss,
            steps=steps,
            trained=trained,
            up=numbers(content),
            down=sent.down,
            bytes_up=sent_bytes(content, self.job.run.compress),
            bytes_down=sent.bytes_down,
            seconds=seconds,
        )

    def reject(self, client: str) -> None:
        self._stores[client] = self._before[client]

    def _late_ones(self) -> None:
        """Forget overdue messages that will never be answered."""
        for sent, answer in self.post.collect(list(self._overdue), seconds=0):
            if isinstance(answer, Failure):
                self._overdue.pop(sent)

    # ------------------------------------------------------------------ personal models
    def evaluate(
        self, clients: Sequence[str], offer: OfferOf, split: str
    ) -> Iterator[tuple[str, dict[str, float]] | Absence]:
        for name, answer in self._ask_clients(clients, "evaluate", {"split": split}, offer):
            measures = answer.head.get("measures") if isinstance(answer, Note) else None
            if isinstance(answer, Failure):
                yield Absence(name, answer.reason, answer.trace)
            elif isinstance(measures, dict) and None not in measures.values() and _measures(measures):
                yield name, measures
            else:
                yield Absence(name, "its answer has no measures")

    def arrive(self, client: str, ask: Ask) -> Mapping[str, Any]:
        offer = ask(None)
        if self._method is None or type(self._method).probe is Method.probe:
            return offer
        for _, answer in self._ask_clients([client], "probe", {}, lambda name: offer):
            if isinstance(answer, Note) and isinstance(answer.body.get("report"), dict):
                return ask(answer.body["report"])
        return offer  # usable as it is

    def leave(self, clients: Sequence[str], offer: OfferOf, out: Path) -> Iterator[tuple[str, Leaving] | Absence]:
        groups = [name for name in clients if name not in self.held_out], [n for n in clients if n in self.held_out]
        for group, held_out in zip(groups, (False, True), strict=True):
            for name, answer in self._ask_clients(group, "finish", {"held_out": held_out}, offer):
                if isinstance(answer, Failure):
                    yield Absence(name, answer.reason, answer.trace)
                    continue
                row, stored = answer.head.get("row"), answer.head.get("stored")
                if not isinstance(row, dict) or not isinstance(stored, int) or not _measures(row):
                    yield Absence(name, "its answer has no measures")
                    continue
                own = json.loads(str(answer.head["own"])) if self.simulation is not None else {}
                yield name, Leaving(row, stored, own.get("artefacts", {}), own.get("texts", []))

    # ------------------------------------------------------------------ checkpoints
    def changed(self) -> dict[str, dict[str, Any]]:
        return {}

    def notes(self) -> dict[str, Any]:
        self._kept = dict(self._stores)
        clients = {info.name: {"rank": info.rank, "examples": info.examples} for info in self.infos.values()}
        return {"stores": dict(self._stores), "clients": clients}

    def restore(self, stores: Mapping[str, dict[str, Any]], notes: Mapping[str, Any]) -> None:
        self._stores = {name: int(round) for name, round in notes.get("stores", {}).items()}
        self._kept, self._before = dict(self._stores), {}

    # ------------------------------------------------------------------ messages
    def _send(
        self, client: str, kind: str, head: Mapping[str, Any], body: dict[str, Any], *, seconds: float | None
    ) -> str:
        member = self.members.get(client)
        return self._to(member.node, kind, head, body, seconds=seconds) if member else ""

    def _to(self, node: int, kind: str, head: Mapping[str, Any], body: dict[str, Any], *, seconds: float | None) -> str:
        simulation = self.simulation
        if simulation is not None:
            names = {member.node: member.name for member in self.members.values()}
            simulation = {**simulation, "name": names.get(node, "")}
        note = Note(kind, {"run": self.key, **head}, body, self.job.run.compress)
        return self.post.send(node, note, seconds=seconds, simulation=simulation)

    def _ask(self, asked: Mapping[int, _Ask], *, seconds: float | None) -> Iterator[tuple[int, Note | Failure]]:
        """Each node's answer, in any order; one that does not come in time is a failure."""
        waiting = {}
        for node, (kind, head, body) in asked.items():
            sent = self._to(node, kind, head, body, seconds=seconds)
            if sent:
                waiting[sent] = node
            else:
                yield node, Failure("its node is not connected any more")
        for sent, answer in self.post.collect(list(waiting), seconds=seconds):
            yield waiting.pop(sent), answer
        for node in waiting.values():
            yield node, Failure(f"it has not answered within {seconds:g} s")

    def _ask_clients(
        self, clients: Sequence[str], kind: str, head: dict[str, Any], offer: OfferOf
    ) -> Iterator[tuple[str, Note | Failure]]:
        online = set(self.post.nodes())
        asked: dict[int, _Ask] = {}
        names = {}
        for name in clients:
            member = self.members.get(name)
            if member is None or member.node not in online:
                yield name, Failure("its node is not connected")
                continue
            names[member.node] = name
            asked[member.node] = (kind, {**head, "store": self._stores.get(name, 0)}, {"offer": dict(offer(name))})
        for node, answer in self._ask(asked, seconds=self.patience):
            yield names[node], answer

    def _rank(self, member: Member) -> int:
        """The rank of a client that joins late: the job's word for its name, else the global one; at most its own."""
        ranks = self.job.federation.ranks
        wanted = ranks.get(member.name) if isinstance(ranks, dict) else None
        rank = wanted or (self._method.setting.rank if self._method else self.job.lora.rank) or 1
        if self._method is not None and self._method.ranks == "equal":
            return rank
        return min(rank, member.rank or rank)

    def _turn_away(self, node: int, client: str, reason: str) -> None:
        if self._refused.get(node, (0.0, ""))[1] != reason:
            self.told(0, client, "refused", reason)
        self._refused[node] = (time.monotonic(), reason)


def _measures(found: Mapping[str, Any]) -> bool:
    """Whether a client's measures are numbers, or None where it has none."""
    return all(value is None or isinstance(value, float | int) for value in found.values())
