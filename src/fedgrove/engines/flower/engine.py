"""The engine whose clients train at the nodes of a Flower grid. All state of clients is theirs.

Of a client the server keeps its node, and the round of its last update that was used: the client
starts from its private store of that round, whatever happened since (``stores``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.adapters.tree import numbers
from fedgrove.engines.flower.masked import MaskedRound
from fedgrove.engines.flower.post import Failure, Post
from fedgrove.engines.flower.wire import Note
from fedgrove.ground.plain import Given, Plain
from fedgrove.methods.contract import ClientInfo, Method, Update
from fedgrove.methods.protocols import Probes
from fedgrove.runs.engine import Absence, Arrival, Ask, Leaving, OfferOf
from fedgrove.wire.compress import sent_bytes
from fedgrove.wire.figures import figures_fault, measures_fault, row_fault
from fedgrove.wire.validate import fault

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.methods.head import HeadPolicy
    from fedgrove.privacy.masked import Opened
    from fedgrove.runs.parts import Parts

GREETING = 900.0  # seconds for a node to read its data and to load the model
FAREWELL = 60.0  # seconds that the end of a run waits for those that are away
TRIES = 20  # how often a client whose node comes and goes is asked in a round that needs it
AGAIN = 60.0  # seconds before a node that refused is asked again

#: What a client's last line may have.
_LEAVING = {"metric_base", "metric", "metric_tuned", "loss", "epsilon", "delta"}
_MEASURED = {"metric_base", "metric", "loss"}  # and what it must

_Ask = tuple[str, Plain, Plain]  # kind, head, body
Told = Callable[[int, str, str, str], None]  # (round, client, what, reason): for the log
Newcomer = Callable[[ClientInfo], None]


def _nobody_listens(
    round: int,
    client: str,
    what: str,
    reason: str,
) -> None:
    pass


def _nobody_cares(info: ClientInfo) -> None:
    pass


@dataclass(frozen=True)
class RemoteClient:
    """A client that said hello."""

    name: str
    node: int
    row: Plain  # as in federation.json
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
    """``simulation``: paths for simulated clients, None for real ones; ``names``: whose key each
    node has, if known; ``told``: hears of what happens to clients.
    """

    def __init__(
        self,
        post: Post,
        key: str,
        job: Job,
        *,
        simulation: dict[str, str] | None = None,
        names: Mapping[int, str] | None = None,
        told: Told = _nobody_listens,
    ):
        self.post = post
        self.key = key
        self.job = job
        self.simulation = simulation
        self.names = dict(names or {})
        self.told = told
        self.patience = job.federation.deadline
        self.late = job.federation.late
        self.least = job.federation.min_clients
        self.members: dict[str, RemoteClient] = {}
        self.infos: dict[str, ClientInfo] = {}
        self.held_out: set[str] = set()
        self._never: frozenset[str] = frozenset()
        self._newcomer: Newcomer = _nobody_cares
        self._stores: dict[str, int] = {}  # round of each client's store
        self._before: dict[str, int] = {}
        self._kept: dict[str, int] = {}  # as _stores, at the last checkpoint
        self._held: dict[str, int] | None = None  # as _stores, at the checkpoint beside it
        # messages without an answer at the deadline, where late ones count
        self._overdue: dict[str, _Sent] = {}
        self._came: dict[str, Note] = {}  # their answers, where they came between rounds
        self._refused: dict[int, tuple[float, str]] = {}
        self._greeted: dict[str, int] = {}  # nodes that were asked who they are, by message
        # who loads the model now; whether it was here before
        self._opening: dict[str, tuple[ClientInfo, bool]] = {}
        self._opened: set[str] = set()  # clients that have loaded the model
        # as _opening: done, and not yet told to the loop
        self._ready: list[tuple[ClientInfo, bool]] = []
        self._method: Method | None = None
        self._head: HeadPolicy | None = None
        self._metric = ""
        self._masks: MaskedRound  # of the round, where updates are masked

    @property
    def trusted(self) -> bool:
        return self.simulation is not None

    # ------------------------------------------------------------------ who is there
    @property
    def greeting(self) -> bool:
        """Whether a node has been asked who it is and has not answered yet."""
        return bool(self._greeted)

    def introduce(self, *, wait: bool = False) -> list[RemoteClient]:
        """Ask every node that is not known who it is; those that have answered with a name of their
        own.

        ``wait``: for all answers. Otherwise a slow node is met at a later call, and keeps nobody
        waiting.
        """
        import fedgrove

        head = {
            "job": self.job.to_toml(),
            "version": fedgrove.__version__,
        }
        for node in self._strangers():
            sent = self._to(
                node,
                "hello",
                head,
                {},
                seconds=GREETING,
            )
            if sent:
                self._greeted[sent] = node
        patience = 0.0
        if wait:
            patience = GREETING
        found: list[RemoteClient] = []
        for sent, answer in self.post.collect(list(self._greeted), seconds=patience):
            node = self._greeted.pop(sent)
            member = self._met(node, answer)
            if member is not None:
                self.members[member.name] = member
                self._opened.discard(member.name)
                found.append(member)
        return sorted(found, key=lambda member: member.name)

    def _strangers(self) -> list[int]:
        """Connected nodes of which nothing is known, or that were turned away a while ago."""
        known = {member.node for member in self.members.values()}
        known.update(self._greeted.values())
        long_ago = time.monotonic() - AGAIN
        found: list[int] = []
        for node in self.post.nodes():
            turned_away, _ = self._refused.get(node, (long_ago, ""))
            if node not in known and turned_away <= long_ago:
                found.append(node)
        return found

    def _met(self, node: int, answer: Note | Failure) -> RemoteClient | None:
        """Who a node says it is; None where it is turned away."""
        called = self.names.get(node, f"node {node}")
        if isinstance(answer, Failure):
            if not answer.gone:  # who went away is asked again when it is back
                self._turn_away(node, called, answer.reason)
            return None
        row, rank = answer.head.get("row"), answer.head.get("rank")
        wrong = row_fault(
            row,
            rank,
            self.job.data.classes,
            strict=not self.trusted,
        )
        if wrong or not isinstance(row, dict):
            self._turn_away(node, called, f"its hello is refused, because {wrong}")
            return None
        if self.names and node not in self.names:
            self._turn_away(node, row["name"], "its node has a key that belongs to no site")
            return None
        if self.names and self.names[node] != row["name"]:
            self._turn_away(
                node,
                row["name"],
                f"its node has the key of {self.names[node]!r}",
            )
            return None
        before = self.members.get(row["name"])
        if before is not None and before.node in self.post.nodes():
            self._turn_away(node, row["name"], "another node with this name is connected")
            return None
        return RemoteClient(row["name"], node, row, rank)

    def open(self, infos: Sequence[ClientInfo]) -> dict[str, str]:
        """Tell clients who they are; each loads the model. Those that cannot, with the reason, are
        forgotten.
        """
        asked: dict[int, _Ask] = {}
        named: dict[int, ClientInfo] = {}
        for info in infos:
            node = self.members[info.name].node
            asked[node] = ("open", self._opening_of(info), {})
            named[node] = info
        answers: dict[str, str] = {}
        for node, answer in self._ask(asked, seconds=GREETING):
            info = named[node]
            answers[info.name] = self._has_opened(info, answer)
        return {name: reason for name, reason in answers.items() if reason}

    def _opening_of(self, info: ClientInfo) -> Plain:
        import fedgrove

        client = {
            "name": info.name,
            "rank": info.rank,
            "examples": info.examples,
        }
        return {
            "job": self.job.to_toml(),
            "version": fedgrove.__version__,
            "client": client,
        }

    def _has_opened(self, info: ClientInfo, answer: Note | Failure) -> str:
        """Nothing where the client can begin, else the reason why it cannot; then it is
        forgotten.
        """
        if isinstance(answer, Failure):
            member = self.members.pop(info.name, None)
            if member is not None:
                self._turn_away(member.node, info.name, answer.reason)
            return answer.reason
        self.infos[info.name] = info
        self._opened.add(info.name)
        return ""

    def _take_in(self) -> None:
        """Meet whoever appeared and let them load the model; those who have are ``_ready``. Nobody
        is waited for.
        """
        self.introduce()
        busy = {info.name for info, _ in self._opening.values()}
        for name, member in sorted(self.members.items()):
            if name in self._opened or name in busy:
                continue
            known = self.infos.get(name)
            info = known or ClientInfo(name, self._rank(member), member.examples)
            sent = self._to(
                member.node,
                "open",
                self._opening_of(info),
                {},
                seconds=GREETING,
            )
            if sent:
                self._opening[sent] = info, known is not None
        for sent, answer in self.post.collect(list(self._opening), seconds=0):
            info, before = self._opening.pop(sent)
            if info.name in self.members and not self._has_opened(info, answer):
                self._ready.append((info, before))

    def expect(self, infos: Sequence[ClientInfo]) -> None:
        """These clients take part, whether they are here or come back."""
        self.infos.update({info.name: info for info in infos})

    def forget(self, name: str) -> None:
        """This client takes no part any more."""
        self.infos.pop(name, None)

    def settle(
        self,
        parts: Parts,
        *,
        held_out: Collection[str],
        never: Collection[str] = (),
        newcomer: Newcomer = _nobody_cares,
    ) -> None:
        """What the server's side checks updates and measures against.

        ``never``: names that do not train even where they come late; ``newcomer`` is told of such
        a one.
        """
        self._method, self._head, self._metric = parts.method, parts.head, parts.task.metric
        self.held_out = set(held_out)
        self._never, self._newcomer = frozenset(never), newcomer

    def joined(self, round: int) -> list[ClientInfo]:
        if self.trusted:
            return []
        self._take_in()
        ready = sorted(self._ready, key=lambda each: each[0].name)
        self._ready = []
        new: list[ClientInfo] = []
        for info, known in ready:
            if known:
                self.told(round, info.name, "back", "it is connected again")
            elif info.name in self.members:
                new.append(info)
        for info in new:
            if info.name in self._never:
                self.held_out.add(info.name)
                self._newcomer(info)
                self.told(round, info.name, "joined", "it is held out, and measured at the end")
        return [info for info in new if info.name not in self._never]

    def refuse(self, client: str, reason: str) -> None:
        member = self.members.pop(client)
        self._opened.discard(client)
        self.infos.pop(client, None)
        self._refused[member.node] = (float("inf"), reason)

    def available(self, clients: Sequence[str]) -> list[str]:
        """Those connected and not still at work; where too few are, it waits for them as long as a
        round may take.
        """
        until = self._deadline()
        while True:
            here = self._idle(clients)
            if len(here) >= min(self.least, len(clients)) or _over(until):
                return here
            if self._overdue:
                self._late_ones()
            time.sleep(min(self.post.slowest, 0.5))
            self._take_in()

    def _idle(self, clients: Sequence[str]) -> list[str]:
        """Those that have loaded the model, are connected and not at work."""
        online = set(self.post.nodes())
        busy: set[str] = set()
        for message, sent in self._overdue.items():
            if message not in self._came:
                busy.add(sent.client)
        idle: list[str] = []
        for name in clients:
            if name in busy or name not in self._opened:
                continue
            member = self.members.get(name)
            if member is not None and member.node in online:
                idle.append(name)
        return idle

    def _deadline(self) -> float | None:
        """When a round that begins now is over, by the monotonic clock."""
        if self.patience is None:
            return None
        return time.monotonic() + self.patience

    # ------------------------------------------------------------------ rounds
    def train(
        self,
        round: int,
        clients: Sequence[str],
        offer: OfferOf,
    ) -> Iterator[Arrival | Absence]:
        waiting, self._overdue = self._overdue, {}
        came, self._came = self._came, {}
        until = self._deadline()
        for sent, note in came.items():
            yield self._arrival(waiting.pop(sent), note)
        todo, present, tries = list(clients), 0, 0
        if self.job.privacy.secure_aggregation:
            yield from self._meet(round, clients)
            todo = [name for name in clients if name in self._masks.mails]
            until = self._deadline()  # each exchange has its own
        while todo:
            tries += 1
            # those whose node went away: asked again where the round has too few without them
            needed, gone = self._ask_all_to_train(todo, round, offer, waiting)
            for sent, answer in self.post.collect(
                list(waiting), needed=needed, seconds=_left(until)
            ):
                asked = waiting.pop(sent)
                if isinstance(answer, Failure) and answer.gone and asked.round == round:
                    gone.append(asked.client)
                    continue
                arrival = self._arrival(asked, answer)
                present += isinstance(arrival, Arrival)
                yield arrival
            too_few = present < min(self.least, len(clients))
            if gone and too_few and tries < TRIES and self._are_back(gone, round, until):
                todo = gone
                continue
            todo = []
            for name in gone:
                yield Absence(name, "its node is not connected any more")
        for sent, asked in waiting.items():
            if asked.round == round:
                yield Absence(asked.client, f"it has not answered within {self.patience:g} s")
            if self.late == "next":
                self._overdue[sent] = asked
            else:
                self.post.forget([sent])

    def _meet(self, round: int, clients: Sequence[str]) -> Iterator[Absence]:
        """The exchanges before a round under masks; those who are lost in them."""
        assert self._method is not None
        infos = [self.infos[name] for name in clients]
        self._masks = MaskedRound(self.job, self.key, self._method, round, infos)
        yield from self._masks.meet(self._ask_each)

    def opened(self, round: int, updates: Sequence[Update]) -> Opened:
        return self._masks.opened(updates, self._ask_each)

    def _ask_all_to_train(
        self,
        clients: Sequence[str],
        round: int,
        offer: OfferOf,
        waiting: dict[str, _Sent],
    ) -> tuple[set[str], list[str]]:
        """(the messages that the round waits for, those whose node is not there); what was sent is
        put among those that are waited for.
        """
        needed, gone = set(), []
        for name in clients:
            sent, asked = self._ask_to_train(name, round, offer)
            if sent:
                waiting[sent] = asked
                needed.add(sent)
            else:
                gone.append(name)
        return needed, gone

    def _are_back(
        self,
        gone: Sequence[str],
        round: int,
        until: float | None,
    ) -> bool:
        """Whether all of those whose node went away are connected again in time."""
        if self.trusted:
            return False
        for name in gone:
            self.told(
                round,
                name,
                "away",
                "its node is not connected any more; the round needs it, and waits",
            )
        return self._wait_for(gone, until)

    def _ask_to_train(
        self,
        name: str,
        round: int,
        offer: OfferOf,
    ) -> tuple[str, _Sent]:
        given = offer(name)
        # A message may be read only as long as its answer can be used.
        lifetime = self.patience
        if lifetime is not None:
            if self.late == "next":
                lifetime = 3 * lifetime + 1
            else:
                lifetime = lifetime + 1
        keep = self._kept.get(name, 0)
        if self._held is not None:
            keep = min(keep, self._held.get(name, 0))
        head = {
            "round": round,
            "store": self._stores.get(name, 0),
            "keep": keep,
        }
        if self.job.privacy.secure_aggregation:
            assert self._method is not None
            assert self._head is not None
            self._masks.expect(self._method, self._head, self.infos[name], given)
            head |= self._masks.beside(name)
        sent = self._send(
            name,
            "train",
            head,
            {"offer": dict(given)},
            seconds=lifetime,
        )
        size = sent_bytes(given, self.job.run.compress)
        return sent, _Sent(name, round, numbers(given), size)

    def _arrival(self, sent: _Sent, answer: Note | Failure) -> Arrival | Absence:
        name = sent.client
        if isinstance(answer, Failure):
            return Absence(name, answer.reason, answer.trace)
        head, content = answer.head, answer.body.get("update")
        loss, steps, trained, seconds = (
            head.get(key) for key in ("loss", "steps", "trained", "seconds")
        )
        if not (
            isinstance(content, dict)
            and isinstance(loss, float)
            and isinstance(steps, int)
            and isinstance(trained, int)
            and isinstance(seconds, float)
        ):
            return Absence(name, "its answer is no update")
        if wrong := figures_fault(steps=steps, trained=trained, seconds=seconds):
            return Absence(name, f"its update is refused, because {wrong}")
        assert self._method is not None
        assert self._head is not None
        info = self.infos.get(name)
        if info is None:
            return Absence(name, "it was turned away in the meantime")
        if self.job.privacy.secure_aggregation:
            wrong = self._masks.fault(content)
        else:
            wrong = fault(content, method=self._method, head=self._head.initial)
        if wrong:
            return Absence(name, f"its update is refused, because {wrong}")
        self._before[name] = self._stores.get(name, 0)
        self._stores[name] = sent.round
        return Arrival(
            update=Update(name, info.examples, content, info.rank),
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
        """Overdue answers that came in the meantime: for the next round, or never where they are
        failures.
        """
        for sent, answer in self.post.collect(
            [sent for sent in self._overdue if sent not in self._came], seconds=0
        ):
            if isinstance(answer, Failure):
                self._overdue.pop(sent)
            else:
                self._came[sent] = answer

    # ------------------------------------------------------------------ personal models
    def evaluate(
        self,
        clients: Sequence[str],
        offer: OfferOf,
        split: str,
    ) -> Iterator[tuple[str, dict[str, float]] | Absence]:
        for name, answer in self._ask_clients(clients, "evaluate", {"split": split}, offer):
            if isinstance(answer, Note):
                measures = answer.head.get("measures")
            else:
                measures = None
            if isinstance(answer, Failure):
                yield Absence(name, answer.reason, answer.trace)
            elif wrong := measures_fault(measures, needed={"loss", self._metric}):
                yield Absence(name, f"its measures are refused, because {wrong}")
            else:
                yield name, dict(measures or {})

    def arrive(self, client: str, ask: Ask) -> Given:
        offer = ask(None)
        method = self._method
        if method is None or not isinstance(method, Probes):
            return offer
        for _, answer in self._ask_clients([client], "probe", {}, lambda name: offer):
            if isinstance(answer, Note) and isinstance(answer.body.get("report"), dict):
                return ask(answer.body["report"])
        return offer  # usable as it is

    def leave(
        self,
        clients: Sequence[str],
        offer: OfferOf,
        out: Path,
        unmeasured: Collection[str] = (),
    ) -> Iterator[tuple[str, Leaving] | Absence]:
        self._wait_for(clients, self._a_while())
        for held_out, measure in product((False, True), (True, False)):
            group = [
                name
                for name in clients
                if (name in self.held_out, name not in unmeasured) == (held_out, measure)
            ]
            head = {"held_out": held_out, "measure": measure}
            for name, answer in self._ask_clients(group, "finish", head, offer):
                if isinstance(answer, Failure):
                    yield Absence(name, answer.reason, answer.trace)
                    continue
                row, stored = answer.head.get("row"), answer.head.get("stored")
                wrong = measures_fault(row, needed=_MEASURED, known=_LEAVING)
                wrong = wrong or figures_fault(stored=stored)
                if wrong or not isinstance(row, dict) or not isinstance(stored, int):
                    yield Absence(name, f"its measures are refused, because {wrong}")
                    continue
                if self.simulation is not None:
                    own = json.loads(str(answer.head["own"]))
                else:
                    own = {}
                yield name, Leaving(row, stored, own.get("artefacts", {}), own.get("texts", []))

    def _wait_for(
        self,
        clients: Sequence[str],
        until: float | None,
    ) -> bool:
        """Whether all of these clients are connected, or are again before ``until`` by the
        monotonic clock.
        """
        while True:
            online = set(self.post.nodes())
            if all(self.members[name].node in online for name in clients if name in self.members):
                return True
            if self.trusted or _over(until):
                return False
            time.sleep(min(self.post.slowest, 0.5))

    def _a_while(self) -> float:
        """Until when what a client has only one chance for waits for it."""
        return time.monotonic() + (
            FAREWELL if self.patience is None else min(FAREWELL, self.patience)
        )

    # ------------------------------------------------------------------ checkpoints
    def changed(self) -> dict[str, Plain]:
        return {}

    def notes(self) -> Plain:
        self._kept = dict(self._stores)
        clients = {
            info.name: {"rank": info.rank, "examples": info.examples}
            for info in self.infos.values()
        }
        return {"stores": dict(self._stores), "clients": clients}

    def restore(
        self,
        stores: Mapping[str, Plain],
        notes: Given,
    ) -> None:
        self._stores = _rounds(notes)
        self._kept, self._before = dict(self._stores), {}

    def hold(self, notes: Given | None) -> None:
        if notes is None:
            self._held = None
        else:
            self._held = _rounds(notes)

    def go_back(self, stores: Mapping[str, Plain], notes: Given) -> None:
        self.restore(stores, notes)  # what was spent is noted at the clients

    # ------------------------------------------------------------------ messages
    def _send(
        self,
        client: str,
        kind: str,
        head: Given,
        body: Plain,
        *,
        seconds: float | None,
    ) -> str:
        member = self.members.get(client)
        if member:
            return self._to(
                member.node,
                kind,
                head,
                body,
                seconds=seconds,
            )
        return ""

    def _to(
        self,
        node: int,
        kind: str,
        head: Given,
        body: Plain,
        *,
        seconds: float | None,
    ) -> str:
        simulation = self.simulation
        if simulation is not None:
            names = {member.node: member.name for member in self.members.values()}
            simulation = {**simulation, "name": names.get(node, "")}
        note = Note(
            kind,
            {"run": self.key, **head},
            body,
            self.job.run.compress,
        )
        return self.post.send(node, note, seconds=seconds, simulation=simulation)

    def _ask(
        self,
        asked: Mapping[int, _Ask],
        *,
        seconds: float | None,
    ) -> Iterator[tuple[int, Note | Failure]]:
        """Each node's answer, in any order; one that does not come in time is a failure.

        A node that goes away with the message is waited for a while, and asked again.
        """
        todo, until = dict(asked), 0.0
        while todo:
            gone = {}
            for node, answer in self._ask_once(todo, seconds=seconds):
                if isinstance(answer, Failure) and answer.gone:
                    gone[node] = answer
                else:
                    yield node, answer
            if not gone:
                return
            until = until or self._a_while()
            time.sleep(min(self.post.slowest, 0.5))
            while (
                set(gone) - set(self.post.nodes()) and not self.trusted and time.monotonic() < until
            ):
                time.sleep(min(self.post.slowest, 0.5))
            again = not self.trusted and time.monotonic() < until
            todo = {node: asked[node] for node in gone if again and node in self.post.nodes()}
            yield from ((node, answer) for node, answer in gone.items() if node not in todo)

    def _ask_once(
        self,
        asked: Mapping[int, _Ask],
        *,
        seconds: float | None,
    ) -> Iterator[tuple[int, Note | Failure]]:
        waiting = {}
        for node, (kind, head, body) in asked.items():
            sent = self._to(
                node,
                kind,
                head,
                body,
                seconds=seconds,
            )
            if sent:
                waiting[sent] = node
            else:
                yield node, Failure("its node is not connected any more")
        for sent, answer in self.post.collect(list(waiting), seconds=seconds):
            yield waiting.pop(sent), answer
        for node in waiting.values():
            yield node, Failure(f"it has not answered within {seconds:g} s")
        self.post.forget(list(waiting))

    def _ask_clients(
        self,
        clients: Sequence[str],
        kind: str,
        head: Plain,
        offer: OfferOf,
    ) -> Iterator[tuple[str, Note | Failure]]:
        """``offer``: is made for those alone that are there."""
        heads = {name: {**head, "store": self._stores.get(name, 0)} for name in clients}
        yield from self._ask_each(kind, heads, lambda name: {"offer": dict(offer(name))})

    def _ask_each(
        self,
        kind: str,
        heads: Mapping[str, Plain],
        body: Callable[[str], Plain] = lambda name: {},
    ) -> Iterator[tuple[str, Note | Failure]]:
        """Each client's answer to a message of its own, in any order."""
        online = set(self.post.nodes())
        asked: dict[int, _Ask] = {}
        names = {}
        for name, head in heads.items():
            member = self.members.get(name)
            if member is None or member.node not in online:
                yield name, Failure("its node is not connected")
                continue
            names[member.node] = name
            asked[member.node] = (kind, head, body(name))
        for node, answer in self._ask(asked, seconds=self.patience):
            yield names[node], answer

    def _rank(self, member: RemoteClient) -> int:
        """The rank of a client that joins late: the job's word for its name, else the global one;
        at most its own.
        """
        ranks = self.job.federation.ranks
        if isinstance(ranks, dict):
            wanted = ranks.get(member.name)
        else:
            wanted = None
        rank = wanted or (self._method.setting.rank if self._method else self.job.lora.rank) or 1
        if self._method is not None and self._method.ranks == "equal":
            return rank
        return min(rank, member.rank or rank)

    def _turn_away(
        self,
        node: int,
        client: str,
        reason: str,
    ) -> None:
        if self._refused.get(node, (0.0, ""))[1] != reason:
            self.told(0, client, "refused", reason)
        self._refused[node] = (time.monotonic(), reason)


def _rounds(notes: Given) -> dict[str, int]:
    """Of each client's store, as a checkpoint noted them."""
    return {name: int(round) for name, round in notes.get("stores", {}).items()}


def _over(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until


def _left(until: float | None) -> float | None:
    """Seconds until then."""
    if until is None:
        return None
    return max(0.0, until - time.monotonic())
