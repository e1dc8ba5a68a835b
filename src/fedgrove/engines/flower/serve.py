"""The server of a run on a grid: who is there, what they run, and the round loop over them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.serverapp import Grid

from fedgrove.engines.flower.deployable import alone, deployable, named_held_out
from fedgrove.engines.flower.engine import FlowerEngine, RemoteClient
from fedgrove.engines.flower.post import Post
from fedgrove.ground.errors import RunError
from fedgrove.ground.files import write_text
from fedgrove.ground.plain import Given, Plain
from fedgrove.methods.contract import ClientInfo
from fedgrove.runs import prepare
from fedgrove.runs.directory import RunDirectory
from fedgrove.runs.fit import refuse_unfit
from fedgrove.runs.parts import Parts
from fedgrove.runs.stage import Stage
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.tracking.events import Events

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.tracking.callback import Callback

Lend = Callable[[int, "Job"], AbstractContextManager[Grid]]  # (nodes, job) -> their grid
OTHERS = (
    30.0  # seconds that a run which could begin waits for others who are about to say who they are
)
MARK = "flower.json"  # in the run's directory: the key under which clients keep their stores


@dataclass(frozen=True, eq=False)
class Roster:
    """The clients as they described themselves; ``table`` is what ``federation.json`` shows."""

    labels: tuple[str, ...]
    rows: Sequence[Given]
    source: Plain
    remarks: tuple[str, ...] = ()  # what sites found out about their data stays there

    def table(self) -> Plain:
        return {
            "labels": list(self.labels),
            "clients": [dict(row) for row in self.rows],
        }


@contextmanager
def on_virtual_nodes(
    lend: Lend,
    job: Job,
    directory: RunDirectory,
    *,
    resume: bool,
    watch: Callback,
) -> Iterator[Stage[FlowerEngine]]:
    """The stage of a simulation: job and data are checked here, before ``lend`` starts anything."""
    key, _ = continued(directory, resume=resume)
    job, people = prepare.settle(job)
    job = alone(job)
    parts = Parts.of(job, people.clients.values())
    refuse_unfit(
        parts,
        people.clients.values(),
        people.held_out.values(),
        local=False,
    )
    paths = {
        "run": str(directory.path.absolute()),
        "directory": os.getcwd(),
    }
    watch.phase("starting Flower")
    with marked(directory, key), lend(len(people.everyone), job) as grid:
        refusals: list[str] = []
        engine = FlowerEngine(
            Post(grid),
            key,
            job,
            simulation=paths,
            told=lambda round, client, what, reason: refusals.append(reason),
        )
        engine.settle(parts, held_out=people.held_out)
        meet(engine, list(people.everyone.values()), refusals, watch)
        yield Stage(
            parts,
            people.federation,
            engine,
            people.clients,
            people.held_out,
            people.fingerprint,
        )


def meet(
    engine: FlowerEngine,
    everyone: Sequence[ClientInfo],
    refusals: Sequence[str],
    watch: Callback,
) -> None:
    """Every simulated client loads the model. Raises ``RunError`` with the sentence of one that
    cannot; ``refusals`` has what the engine told of those whom it turned away.
    """
    watch.phase("loading the model in the clients' processes")
    settled(engine.post, len(everyone))
    engine.introduce(wait=True)
    if refusals:
        raise RunError(refusals[0])
    if any(info.name not in engine.members for info in everyone):
        raise RunError(
            f"The job has {len(everyone)} clients, but Flower runs {len(engine.members)} nodes; "
            f"run it with --federation-config 'num-supernodes={len(everyone)}'."
        )
    failed = engine.open(everyone)
    if failed:
        raise RunError(next(iter(failed.values())))


@contextmanager
def between_sites(
    grid: Grid,
    names: Mapping[int, str] | None,
    job: Job,
    directory: RunDirectory,
    *,
    resume: bool,
    watch: Callback,
) -> Iterator[Stage[FlowerEngine]]:
    """The stage of a deployment. Waits until ``federation.min_clients`` sites have said hello."""
    import torch

    key, known = continued(directory, resume=resume)
    job = deployable(prepare.machine_choices(job.resolved()))
    torch.set_num_threads(int(job.train.threads))
    told = telling(directory, watch)
    engine = FlowerEngine(
        Post(grid, again=True),
        key,
        job,
        names=names,
        told=told,
    )
    least = job.federation.min_clients
    among = None
    if known:
        among = set(known)
    members = gather(engine, least, watch, among=among)
    everyone = known or ranked(job, members)
    never = named_held_out(job)
    clients = {name: info for name, info in everyone.items() if name not in never}
    held_out = {name: info for name, info in everyone.items() if name in never}
    if not clients:
        raise RunError(
            "Every site that is here is held out, so nobody would train; see federation.held_out."
        )
    parts = Parts.of(job, clients.values())
    refuse_unfit(parts, clients.values(), held_out.values(), local=False)
    engine.expect([*clients.values(), *held_out.values()])
    engine.settle(
        parts,
        held_out=held_out,
        never=never,
        newcomer=lambda info: held_out.update({info.name: info}),
    )
    in_order = sorted(members, key=lambda member: member.name)
    rows = [member.row for member in in_order]
    roster = Roster(job.data.classes, rows, {"name": "the sites' own data"})
    with marked(directory, key):
        watch.phase("waiting for the sites to load the model")
        here = [info for info in engine.infos.values() if info.name in engine.members]
        failed = engine.open(here)
        if not known:  # who cannot begin is not waited for
            for name in failed:
                engine.forget(name)
                clients.pop(name, None)
                held_out.pop(name, None)
        _refuse_too_few(clients, least, failed)
        yield Stage(parts, roster, engine, clients, held_out, "at the sites")


def _refuse_too_few(
    clients: Collection[str],
    least: int,
    failed: Mapping[str, str],
) -> None:
    """Raises ``RunError`` with the reasons of those that cannot take part, by name."""
    if len(clients) < least:
        why = "; ".join(f"{name}: {reason}" for name, reason in sorted(failed.items()))
        raise RunError(f"{len(clients)} of {least} sites can take part ({why}).")


def settled(
    post: Post,
    nodes: int,
    seconds: float = 30.0,
) -> None:
    """Wait for a simulation's nodes, which Flower registers while the server starts: all, or no new
    ones for 1 s.
    """
    began = changed = time.monotonic()
    seen = 0
    while len(post.nodes()) < nodes:
        now, here = time.monotonic(), len(post.nodes())
        if here != seen:
            seen, changed = here, now
        if now - began > seconds or (seen and now - changed > 1.0):
            return
        time.sleep(0.02)


def gather(
    engine: FlowerEngine,
    least: int,
    watch: Callback,
    among: set[str] | None = None,
) -> list[RemoteClient]:
    """Wait for ``least`` clients (``among``: of these names) to say hello, and a little for
    others.
    """
    said, until = None, float("inf")
    while True:
        engine.introduce()
        here = [member for name, member in engine.members.items() if among is None or name in among]
        if len(here) >= least:
            until = min(until, time.monotonic() + OTHERS)
            if not engine.greeting or time.monotonic() >= until:
                return list(engine.members.values())
        if said != len(here):
            said = len(here)
            watch.phase(f"waiting for sites: {said} of {least} are here")
        time.sleep(min(1.0, engine.post.slowest))


def ranked(job: Job, members: Sequence[RemoteClient]) -> dict[str, ClientInfo]:
    """Every site's rank: the job's word for it, at most what it affords; one for all where the
    method needs that.
    """
    names = sorted(member.name for member in members)
    wanted = job.federation.ranks
    if isinstance(wanted, dict):
        ranks = {name: wanted.get(name, job.lora.rank or 1) for name in names}
    else:
        ranks = job.ranks(names)
    rows = {member.name: member for member in members}
    affordable: dict[str, int] = {}
    for name, rank in ranks.items():
        affordable[name] = min(rank, rows[name].rank or rank)
    fitting = prepare.fitting_ranks(job, affordable)
    clients: dict[str, ClientInfo] = {}
    for name in names:
        clients[name] = ClientInfo(name, fitting[name], rows[name].examples)
    return clients


def continued(directory: RunDirectory, *, resume: bool) -> tuple[str, dict[str, ClientInfo]]:
    """(the run's key, the clients that its last checkpoint knows); a new key and nobody where it
    starts.
    """
    mark, checkpoints = directory.path / MARK, Checkpoints(directory.path / "checkpoints")
    if resume and mark.exists():
        try:
            key = str(json.loads(mark.read_text(encoding="utf-8"))["run"])
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(
                f"{mark} cannot be read; start the run again in a new directory."
            ) from None
        if checkpoints.exists():
            notes = checkpoints.load_server().get("engine", {})
        else:
            notes = {}
        known = {
            name: ClientInfo(name, row["rank"], row["examples"])
            for name, row in notes.get("clients", {}).items()
        }
        return key, dict(sorted(known.items()))
    if resume and checkpoints.exists():
        raise RunError(
            f"{directory.path} was begun with the local engine; go on with it, or choose another "
            f"--out."
        )
    return secrets.token_hex(8), {}


@contextmanager
def marked(directory: RunDirectory, key: str) -> Iterator[None]:
    """The run's key on disk before a client keeps anything under it; gone again where the run never
    begins.
    """
    mark = directory.path / MARK
    existed = mark.exists()
    write_text(mark, json.dumps({"run": key}) + "\n")
    try:
        yield
    except BaseException:
        if not existed and not (directory.path / "job.toml").exists():
            mark.unlink(missing_ok=True)
            shutil.rmtree(directory.path / "sites", ignore_errors=True)
        raise


def telling(directory: RunDirectory, watch: Callback) -> Callable[[int, str, str, str], None]:
    """Events of the engine, for the run's log and for the watcher."""
    events = Events(directory.path / "events.jsonl")

    def tell(
        round: int,
        client: str,
        what: str,
        reason: str,
    ) -> None:
        events.write(round, client, what, reason)
        watch.client_lost(round, client, what, reason)

    return tell
