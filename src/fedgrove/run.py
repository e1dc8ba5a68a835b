"""The round loop. It knows nothing of progress bars, logs or plots: those are callbacks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.finish import finish
from fedgrove.methods.contract import Update
from fedgrove.prepare import Prepared, prepare
from fedgrove.rundir import RunDirectory
from fedgrove.tracking.callback import Callback, Callbacks, RunInfo
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.tracking.metrics import MetricsLog, truncate_after
from fedgrove.tracking.noise import Lab, NoiseLab
from fedgrove.tree import Tree

if TYPE_CHECKING:
    from fedgrove.engines.base import Arrival
    from fedgrove.job import Job
    from fedgrove.result import Result


@dataclass
class Ledger:
    """What a run has cost so far; part of every checkpoint."""

    bytes_up: int = 0
    bytes_down: int = 0
    trained: dict[str, list[int]] = field(default_factory=dict)  # numbers, by client, one for each of its rounds
    up: dict[str, list[int]] = field(default_factory=dict)
    down: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"total": 0.0, "training": 0.0, "evaluation": 0.0, "server": 0.0}
    )

    def arrived(self, arrival: Arrival) -> None:
        self.bytes_up += arrival.bytes_up
        self.bytes_down += arrival.bytes_down
        name = arrival.update.client
        self.trained.setdefault(name, []).append(arrival.trained)
        self.up.setdefault(name, []).append(arrival.up)
        self.down.setdefault(name, []).append(arrival.down)

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started


def run(
    job: Job,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    baselines: Sequence[Path] = (),
) -> Result:
    """Run a job into the directory ``out`` (default: the job's ``run.out``).

    With ``resume`` a stopped run goes on bit-identically from its last checkpoint, a finished one is left as it is, and
    another job's directory is refused. ``baselines`` are finished runs that the report shows beside this one.
    Raises ``FedgroveError`` for bad input before anything is written; ``KeyboardInterrupt`` leaves a resumable run.
    """
    from fedgrove.result import Result

    directory = RunDirectory(Path(out) if out is not None else job.directory())
    job = directory.admit(job, resume=resume)
    if resume and directory.finished():
        return Result(directory.path)
    watch = Callbacks(callbacks)
    try:
        with directory.lock():
            watch.phase("loading model and data")
            prepared = prepare(job)
            directory.open(prepared, resume=resume)
            loop = Loop(prepared, directory, watch)
            try:
                loop.rounds()
                finish(loop, baselines=baselines)
            except KeyboardInterrupt:
                watch.run_stopped(loop.done, "interrupted")
                raise
    finally:
        watch.close()
    return Result(directory.path)


class Loop:
    """One run in progress: the server's state, the ledger, and where it is."""

    def __init__(self, prepared: Prepared, directory: RunDirectory, watch: Callback):
        self.prepared, self.directory = prepared, directory
        self.metrics = MetricsLog(directory.path / "metrics.jsonl")
        self.watch = Callbacks([self.metrics, watch])
        self.checkpoints = Checkpoints(directory.path / "checkpoints")
        self.noise = Lab()
        if prepared.job.run.noise:
            self.noise = lab = NoiseLab(prepared.method, prepared.base.sites, directory.path)
            prepared.half.watch = lab.seen
        self.ledger = Ledger()
        self.head: Any = None  # the mean of the clients' heads, where one is kept
        self.done = 0  # rounds completed
        if self.checkpoints.exists():
            self._restore()
        else:
            self.state = prepared.method.begin(list(prepared.clients.values()))
            truncate_after(self.metrics.path, -1)
            self.noise.truncate_after(-1)
        self.started = time.perf_counter() - self.ledger.seconds["total"]

    def rounds(self) -> None:
        """All the rounds that are left."""
        prepared, job = self.prepared, self.prepared.job
        title = f"{prepared.method.title} on {job.model.name}"
        names = tuple(prepared.clients)
        info = RunInfo(job.method.name, title, job.run.rounds, names, self.directory.path, job.to_dict(), self.done + 1)
        self.watch.run_started(info)
        for number in range(self.done + 1, job.run.rounds + 1):
            self.round(number)

    def round(self, number: int) -> None:
        """Offer, train, aggregate, evaluate, checkpoint."""
        prepared, job, ledger = self.prepared, self.prepared.job, self.ledger
        method, engine = prepared.method, prepared.engine
        selected = method.select(self.state, number, list(prepared.clients), job.federation.fraction)
        self.watch.round_started(number, selected)
        self.noise.begin(number, self.state)
        updates = []
        with ledger.clock("training"):
            for arrival in engine.train(number, selected, lambda name: self.offer(name, number)):
                ledger.arrived(arrival)
                updates.append(arrival.update)
                self.watch.client_done(number, train_line(number, arrival))
        updates.sort(key=lambda update: update.client)
        with ledger.clock("server"):
            parts = [method_part(update) for update in updates]
            self.state = method.aggregate(self.state, number, parts)
            self.head = prepared.head.aggregate(self.head, updates)
        self.noise.end(self.state, parts)
        last = number == job.run.rounds
        if last or number % job.run.eval_every == 0:
            with ledger.clock("evaluation"):
                lines = [
                    {"round": number, "client": name, "split": split, **measures}
                    for split in prepared.splits
                    for name, measures in engine.evaluate(
                        list(prepared.clients), lambda name: self.deployed(name, number), split
                    )
                ]
            self.watch.evaluated(number, lines)
        self.watch.round_done(number, {"bytes_up": ledger.bytes_up, "bytes_down": ledger.bytes_down})
        self.done = number
        if last or number % job.run.checkpoint_every == 0:
            self.save()

    def offer(self, client: str, round: int) -> Tree:
        """What goes down to a client: the method's part and the head policy's."""
        prepared = self.prepared
        content = prepared.method.offer(self.state, round, prepared.clients[client])
        return prepared.head.beside(content, self.head, newcomer=False)

    def deployed(self, client: str, round: int) -> Tree:
        """What a client's personal model is made of after round ``round``."""
        prepared = self.prepared
        content = prepared.method.deploy(self.state, round, prepared.clients[client])
        return prepared.head.beside(content, self.head, newcomer=False)

    def save(self) -> None:
        """A checkpoint of everything, after the metrics of its rounds are on disk."""
        self.ledger.seconds["total"] = time.perf_counter() - self.started
        server = {
            "state": self.state,
            "head": dict(self.head) if self.head else None,
            "ledger": dict(vars(self.ledger)),
        }
        self.checkpoints.save(self.done, server, self.prepared.engine.changed())

    def _restore(self) -> None:
        self.done, server, stores = self.checkpoints.load()
        self.state, self.head = server["state"], server["head"]
        self.ledger = Ledger(**server["ledger"])
        self.prepared.engine.restore(stores)
        truncate_after(self.metrics.path, self.done)
        self.noise.truncate_after(self.done)


def method_part(update: Update) -> Update:
    """The update as the method's server half sees it: without the head policy's part."""
    return replace(update, content=update.content["method"])


def train_line(number: int, arrival: Arrival) -> dict[str, Any]:
    return {
        "round": number,
        "client": arrival.update.client,
        "split": "train",
        "loss": arrival.loss,
        "examples": arrival.update.examples,
        "steps": arrival.steps,
        "bytes_up": arrival.bytes_up,
        "bytes_down": arrival.bytes_down,
        "seconds": round(arrival.seconds, 4),
    }
