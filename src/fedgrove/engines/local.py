"""Everything in this process: one resident base, the clients one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.adapters.assembly import Assembly
from fedgrove.adapters.tree import numbers
from fedgrove.defence.attack import SPLIT, Attackers
from fedgrove.federation.encoded import EncodedClients
from fedgrove.federation.tasks.base import Example
from fedgrove.ground.errors import JobError, RunError
from fedgrove.ground.plain import Given, Plain
from fedgrove.interop.copies import Copies
from fedgrove.methods.contract import ClientInfo, Update
from fedgrove.privacy.client_dp import change
from fedgrove.privacy.example_dp import NOTES
from fedgrove.privacy.masked import MASKED, Addition, Opened, noise_key, terms, weighted
from fedgrove.runs.engine import Arrival, Ask, Leaving, OfferOf
from fedgrove.runs.fit import refuse_unfit
from fedgrove.runs.leave import leave
from fedgrove.runs.noise import Lab, NoiseLab
from fedgrove.runs.parts import Parts
from fedgrove.runs.prepare import settle
from fedgrove.runs.stage import Stage
from fedgrove.secure import fixed
from fedgrove.secure.room import Room
from fedgrove.training.client import ClientHalf, ClientRound, Outcome, Store
from fedgrove.training.cohort_size import cohort_size, row_by_row
from fedgrove.training.lanes import lane_count
from fedgrove.training.memory import EVERY, release
from fedgrove.training.profile import span
from fedgrove.wire.compress import passed, sent_bytes

if TYPE_CHECKING:
    from fedgrove.federation.federation import Client
    from fedgrove.job import Job
    from fedgrove.runs.directory import RunDirectory
    from fedgrove.tracking.callback import Callback
    from fedgrove.training.kernel import Kernel


def prepare(job: Job, out: Path | None = None) -> Stage[LocalEngine]:
    """Resolve the job, load what it names, and check that it fits together.

    ``out``: where ``run.noise`` is to be recorded. Raises ``FedgroveError``; nothing is written.
    """
    job, people = settle(job)
    parts = Parts.of(job, people.clients.values())
    parts = replace(parts, job=with_cohort(parts, len(people.clients)), copies=Copies())
    refuse_unfit(
        parts,
        people.clients.values(),
        people.held_out.values(),
        local=True,
    )
    lab, watch = Lab(), None
    if job.run.noise and out is not None:
        lab = noise = NoiseLab(parts.method, parts.base.sites, out)
        watch = noise.seen
    half = parts.client_half(watch=watch)
    attackers = Attackers.drawn(job.attack, people.clients, job.run.seed)
    rows = {each.name: each for each in people.federation.clients}
    data = EncodedClients(list(rows), lambda name: encoded(parts, rows[name], attackers))
    engine = LocalEngine(
        parts,
        half,
        people.everyone,
        data,
        people.held_out,
        out,
    )
    return Stage(
        parts,
        people.federation,
        engine,
        people.clients,
        people.held_out,
        people.fingerprint,
        lab,
    )


@contextmanager
def in_process(
    job: Job,
    directory: RunDirectory,
    *,
    resume: bool,
    watch: Callback,
) -> Iterator[Stage[LocalEngine]]:
    """The stage of a local run. One that was begun on Flower has its clients' stores elsewhere."""
    if (directory.path / "flower.json").exists():
        raise RunError(
            f"{directory.path} was begun with the flower engine; go on with --engine flower, or "
            f"choose another --out."
        )
    if (directory.path / "pooled.json").exists():
        raise RunError(
            f"{directory.path} was begun by `fedgrove compare` with all rows on one machine; go on "
            f"with that comparison, or choose another --out."
        )
    with span("loading model and data"):
        stage = prepare(job, directory.path)
    for remark in remarks(stage):
        watch.remark(remark)
    yield stage


def remarks(stage: Stage[LocalEngine]) -> list[str]:
    """What a user would want to know before the run goes on."""
    most = stage.task.tokens.get("max_length", 0)
    if not most or stage.task.windows:  # nothing is cut
        return []
    rows: list[Example] = []
    data = stage.engine.data
    for splits in data.ready.values():
        for split in splits.values():
            rows.extend(split)
    full = 0
    for row in rows:
        if stage.task.length(row) >= most:
            full += 1
    if not full:
        return []
    of = ""
    if len(data.ready) < len(data):
        of = f" of the first {len(data.ready):,} clients"
    return [
        f"{full} of {len(rows)} rows{of} fill data.max_length = {most} tokens, and longer ones are cut "
        f"there "
        "(`fedgrove data --tokens` counts them)"
    ]


def encoded(parts: Parts, client: Client, attackers: Attackers) -> dict[str, list[Example]]:
    """A client's splits as it trains on them, and the rows that tell whether an attack worked."""
    labels = parts.task.labels
    splits = parts.encode(attackers.trains_on(client, labels))
    if asked := attackers.asked(client, labels):
        splits[SPLIT] = parts.task.encode(asked, parts.base.processor)
    return splits


def with_cohort(parts: Parts, clients: int) -> Job:
    """The job with ``train.cohort`` decided. Raises ``JobError`` where clients cannot share a
    batch.
    """
    job, base = parts.job, parts.base
    if job.train.cohort == "auto":
        size = cohort_size(
            job,
            base,
            parts.method.setting,
            clients,
            lane_count(job),
        )
        return job.replace(train={"cohort": size})
    if job.train.cohort > 1 and not row_by_row(base):
        raise JobError(
            f"train.cohort = {job.train.cohort}, but {job.model.name} divides its images into "
            f"windows, so clients "
            'cannot share a batch; set it to 1 or "auto".'
        )
    return job


class LocalEngine:
    """The simulation engine. Stores stay in memory; a checkpoint is handed those that changed."""

    trusted = True

    def __init__(
        self,
        parts: Parts,
        half: ClientHalf,
        clients: Mapping[str, ClientInfo],
        data: EncodedClients,
        held_out: Collection[str] = (),
        out: Path | None = None,
    ):
        self.parts = parts
        self.job = parts.job
        self.half = half
        self.clients = clients
        self.data = data
        self.held_out = held_out
        self._stores: dict[str, Store] = {}
        self._before: dict[str, Store] = {}  # a client's store before its update of this round
        self._changed: set[str] = set()
        self.out = out  # the run's directory, where it has one
        self._room: Room | None = None  # of the round, where updates are masked

    def joined(self, round: int) -> Sequence[ClientInfo]:
        return ()

    def refuse(self, client: str, reason: str) -> None:
        """Nobody joins in a process."""

    def available(self, clients: Sequence[str]) -> list[str]:
        return list(clients)

    def train(
        self,
        round: int,
        clients: Sequence[str],
        offer: OfferOf,
    ) -> Iterator[Arrival]:
        how = self.job.run.compress
        self._before = {}
        self._room = None
        if self.job.privacy.secure_aggregation:
            agreed = terms(self.job, "simulated", round, f"round {round}")
            self._room = Room(agreed, clients)
        for name, given, bytes_down, outcome in self._outcomes(round, clients, offer):
            content = outcome.update.content
            if self._room is not None:
                content = self._masked(self._room, outcome.update, given, round)
            bytes_up = sent_bytes(content, how)  # refuses what is private
            content = passed(content, how)
            self._before[name] = self.store(name)
            self._stores[name] = outcome.store
            self._changed.add(name)
            yield Arrival(
                update=replace(outcome.update, content=content),
                round=round,
                loss=outcome.loss,
                steps=outcome.steps,
                trained=outcome.trained,
                up=numbers(content),
                down=numbers(given),
                bytes_up=bytes_up,
                bytes_down=bytes_down,
                seconds=outcome.seconds,
            )

    def _outcomes(
        self,
        round: int,
        clients: Sequence[str],
        offer: OfferOf,
    ) -> Iterator[tuple[str, Given, int, Outcome]]:
        """(client, its offer as it arrived, its bytes, what it made of it), ``train.cohort`` a lane
        at a time.
        """
        how, lanes = self.job.run.compress, self.half.lanes
        size = len(lanes.kernels) * int(self.job.train.cohort)
        for start in range(0, len(clients), size):
            names = clients[start : start + size]
            offers = [offer(name) for name in names]
            given = [passed(each, how) for each in offers]
            sizes = [sent_bytes(each, how) for each in offers]
            turns = [self._turn(name, each) for name, each in zip(names, given, strict=True)]
            outcomes = self.half.train_together(turns, round)
            if start // EVERY != (start + size) // EVERY:
                release()
            yield from zip(names, given, sizes, outcomes, strict=True)

    def _turn(self, client: str, given: Given) -> ClientRound:
        train = self.data[client]["train"]
        return ClientRound(
            self.clients[client],
            train,
            given,
            self.store(client),
        )

    def _masked(
        self,
        room: Room,
        update: Update,
        given: Given,
        round: int,
    ) -> Plain:
        """What the client sends where the server is to learn the sum alone."""
        half, info = self.half, self.clients[update.client]
        own = change(
            half.method,
            half.head,
            info,
            update.content,
            given,
            round,
        )
        asked = list(room.members)
        addition = Addition(info.name, round, own, info.examples, self._scale(asked))
        key = noise_key(self.job, self.out)
        words = addition.words(self.job.privacy, len(asked), key)
        return {MASKED: fixed.to_tensor(room.mask(info.name, words))}

    def opened(self, round: int, updates: Sequence[Update]) -> Opened:
        assert self._room is not None
        asked = list(self._room.members)
        masked = {each.client: fixed.from_tensor(each.content[MASKED]) for each in updates}
        steps = fixed.signed(self._room.total(masked))
        return Opened(steps, len(asked), self._scale(asked))

    def _scale(self, asked: Sequence[str]) -> int | None:
        """The largest weight of those who were asked; None where all weigh the same."""
        if not weighted(self.half.method):
            return None
        return max(self.clients[name].examples for name in asked)

    def _given(self, offer: Given) -> Given:
        """An offer as it arrives."""
        given: Given = passed(offer, self.job.run.compress)
        return given

    def reject(self, client: str) -> None:
        rejected = self._stores[client]
        before = dict(self._before[client])
        if NOTES in rejected:  # what an update cost is spent, used or not
            before[NOTES] = rejected[NOTES]
        self._stores[client] = before

    def evaluate(
        self,
        clients: Sequence[str],
        offer: OfferOf,
        split: str,
    ) -> Iterator[tuple[str, dict[str, float]]]:
        def models() -> Iterator[tuple[str, Assembly]]:
            for name in clients:
                if split == SPLIT and SPLIT not in self.data[name]:
                    continue
                given = self._given(offer(name))
                yield name, self.personal(name, given)

        def measure(kernel: Kernel, item: tuple[str, Assembly]) -> tuple[str, dict[str, float]]:
            name, model = item
            half = self.half.alone(kernel)
            examples = self.data[name][split]
            return name, half.measure(name, model, examples)

        yield from self.half.lanes.map(measure, models())

    def arrive(self, client: str, ask: Ask) -> Given:
        def through(report: Given | None) -> Given:
            if report is not None:
                report = self._given(report)
            return self._given(ask(report))

        return self.half.arrive(
            self.clients[client],
            self.data[client]["train"],
            through,
        )

    def leave(
        self,
        clients: Sequence[str],
        offer: OfferOf,
        out: Path,
        unmeasured: Collection[str] = (),
    ) -> Iterator[tuple[str, Leaving]]:
        # their probes need the kernel
        arrived = {name: offer(name) for name in clients if name in self.held_out}

        def offers() -> Iterator[tuple[str, Given]]:
            for name in clients:
                yield name, arrived[name] if name in arrived else offer(name)

        def go(kernel: Kernel, item: tuple[str, Given]) -> tuple[str, Leaving]:
            name, offered = item
            gone = leave(
                self.parts,
                self.half.alone(kernel),
                self.clients[name],
                self.data[name],
                self._given(offered),
                self.store(name),
                out / "adapters",
                held_out=name in self.held_out,
                keep_texts=True,
                measure=name not in unmeasured,
            )
            return name, gone

        yield from self.half.lanes.map(go, offers())

    def personal(self, client: str, offer: Given) -> Assembly:
        """The client's model as it would deploy it, head included."""
        return self.half.personal(
            self.clients[client],
            offer,
            self.store(client),
        )

    def store(self, client: str) -> Store:
        return self._stores.get(client, {})

    def changed(self) -> dict[str, Store]:
        stores = {name: self._stores[name] for name in sorted(self._changed)}
        self._changed.clear()
        return stores

    def notes(self) -> Plain:
        return {}

    def restore(
        self,
        stores: Mapping[str, Store],
        notes: Given | None = None,
    ) -> None:
        self._stores = dict(stores)
        self._changed.clear()

    def hold(self, notes: Given | None) -> None:
        """Stores are in the checkpoint."""

    def go_back(self, stores: Mapping[str, Store], notes: Given | None = None) -> None:
        spent = {name: store[NOTES] for name, store in self._stores.items() if NOTES in store}
        self.restore(stores, notes)
        for name, noted in spent.items():
            self._stores[name] = {**self.store(name), NOTES: noted}
