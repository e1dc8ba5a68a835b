"""A whole vertical run: directory, all parties together, each alone, what leaves, and the report.

Every party is simulated in this process. What would travel is encoded and decoded, so a party's own
tensors cannot be among it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgrove.aggregate.progress import Phase, silent
from fedgrove.ground import files, versions
from fedgrove.ground.ctrlc import remembered
from fedgrove.ground.errors import JobError, RunError
from fedgrove.ground.plain import Plain
from fedgrove.ground.seeds import generator
from fedgrove.privacy import accountant, randomness
from fedgrove.runs.directory import RunDirectory
from fedgrove.runs.prepare import has_device
from fedgrove.vertical.course import Course, Measured
from fedgrove.vertical.guard import Guard
from fedgrove.vertical.job import METHODS, VerticalJob
from fedgrove.vertical.leave import leave
from fedgrove.vertical.party import Columns, Effort, Party
from fedgrove.vertical.report import write_page
from fedgrove.vertical.server import SERVERS, Split
from fedgrove.vertical.tables import Entities, entities, numbers, texts

JOB = "job.toml"
SUMMARY = "summary.json"
TOGETHER = "together"
#: what a run may leave that was killed before it began
_BEFORE = ("run.lock", "entities.json", "versions.json")


@dataclass(frozen=True)
class Finished:
    """A finished run: its directory, and what ``summary.json`` says."""

    path: Path
    summary: Plain


def run(
    job: VerticalJob,
    out: Path | None = None,
    *,
    resume: bool = False,
    engine: str = "local",
    phase: Phase = silent,
) -> Finished:
    """Run a job into the directory ``out`` (default: the job's ``run.out``).

    Raises ``FedgroveError`` for bad input before anything is written; ``KeyboardInterrupt`` leaves a
    run that ``resume`` continues to the same bytes.
    """
    refuse_engine(engine)
    folder = Path(out) if out is not None else job.directory()
    _admit(job, folder, resume=resume)
    if resume and (folder / SUMMARY).exists():
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        write_page(folder)
        return Finished(folder, summary)
    _refuse_unfit(job)
    joined = entities(job)
    with remembered(), RunDirectory(folder).lock():
        parties = _parties(job, joined)
        _open(job, joined, folder)
        summary = _conduct(job, joined, parties, folder, phase)
        files.write_json(folder / SUMMARY, summary)
        write_page(folder)
    return Finished(folder, summary)


def refuse_engine(engine: str) -> None:
    """Raises ``JobError`` for an engine that cannot run columns."""
    if engine == "flower":
        raise JobError(
            "A vertical run is simulated in one process (--engine local): its parties exchange a message "
            "for every batch, and Flower's rounds between organisations carry one message of each client."
        )
    if engine != "local":
        raise JobError(f"There is no engine {engine!r}; there is local.")


# ------------------------------------------------------------------------------ directory
def _admit(job: VerticalJob, folder: Path, *, resume: bool) -> None:
    """Refuse foreign and used directories before anything is written."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; choose another --out.")
    used = folder.exists() and any(entry.name not in _BEFORE for entry in folder.iterdir())
    recorded = folder / JOB
    if used and not resume:
        raise RunError(
            f"{folder} is not empty; continue a run with --resume, or choose another --out."
        )
    if not used:
        return
    if not recorded.exists():
        raise RunError(f"{folder} holds no vertical run (no {JOB}); choose another --out.")
    before = tomllib.loads(recorded.read_text(encoding="utf-8"))
    different = [
        f"{section}.{key}"
        for section, keys in job.to_dict().items()
        for key in sorted({*keys, *before.get(section, {})})
        if keys.get(key) != before.get(section, {}).get(key) and (section, key) != ("run", "out")
    ]
    if different:
        raise RunError(
            f"{folder} holds another job ({', '.join(different[:3])} differ); resume it with its own "
            f"job, or choose another --out."
        )


def _open(job: VerticalJob, joined: Entities, folder: Path) -> None:
    """Write what is known before the first epoch."""
    described: Plain = {
        "entities": len(joined.labels),
        "classes": list(joined.classes),
        "train": len(joined.train),
        "test": len(joined.test),
        "left_out": dict(joined.joined.left_out),
        "fingerprint": joined.fingerprint,
    }
    table = folder / "entities.json"
    if table.exists():
        before = json.loads(table.read_text(encoding="utf-8"))
        if before != described:
            raise RunError(
                f"The data changed since {folder} was begun; restore them, or choose another --out."
            )
    files.write_json(table, described)
    versions.write(folder)
    files.write_text(folder / JOB, job.to_toml())


def _refuse_unfit(job: VerticalJob) -> None:
    device = job.settings.train.device
    if not has_device(device):
        raise JobError(f'train.device = "{device}" is not here; set it to "cpu".')
    if job.settings.privacy.noise:
        accountant.require()
        randomness.require()


# ---------------------------------------------------------------------------------- parts
def _parties(job: VerticalJob, joined: Entities) -> list[Party]:
    """All parties that speak, with fresh tensors."""
    return [_party(job, joined, name, len(job.speaking)) for name in job.speaking]


def _party(
    job: VerticalJob,
    joined: Entities,
    name: str,
    together: int,
) -> Party:
    """A party among so many that learn together."""
    section = job.parties[name]
    settings = job.settings
    classes = None
    if SERVERS[settings.method.name].theirs:
        classes = len(joined.classes)
    drawn = generator(settings.run.seed, name, "embedding")
    effort = effort_of(job, together)
    rows = joined.tables[name]
    if section.columns is not None:
        return Columns(
            name,
            effort,
            numbers(name, section, rows),
            joined.train,
            width=section.width,
            classes=classes,
            generator=drawn,
        )
    from fedgrove.vertical.texts import Texts

    return Texts(
        name,
        effort,
        section,
        texts(name, section, rows),
        classes=classes,
        train=settings.train,
        seed=settings.run.seed,
        generator=drawn,
    )


def effort_of(job: VerticalJob, together: int) -> Effort:
    """The work for one message, of a party among so many."""
    method = job.settings.method
    train = job.settings.train
    steps = method.local_steps
    if SERVERS[method.name] is Split:
        steps = 1
    damp = 0.0
    if method.prox:
        damp = (together - 1) * method.rho
    return Effort(
        steps=steps,
        lr=train.lr,
        head_lr=train.head_lr or train.lr,
        decay=train.weight_decay,
        rho=method.rho,
        damp=damp,
    )


def _course(
    job: VerticalJob,
    joined: Entities,
    parties: Sequence[Party],
    folder: Path,
    guard: Guard,
) -> Course:
    server = SERVERS[job.settings.method.name](
        joined.labels,
        len(joined.classes),
        {party.name: party.width for party in parties},
        effort_of(job, len(parties)),
    )
    return Course(job, joined, parties, server, guard, folder)


# --------------------------------------------------------------------------------- courses
def _conduct(
    job: VerticalJob,
    joined: Entities,
    parties: Sequence[Party],
    folder: Path,
    phase: Phase,
) -> Plain:
    """All courses, and what ``summary.json`` says of them."""
    epochs = job.settings.train.epochs
    title = METHODS[job.settings.method.name]
    key = _key(job, folder)
    alone: dict[str, Measured] = {}
    if job.settings.run.alone:
        for party in parties:
            fresh = party.store()
            party.effort = effort_of(job, 1)
            guard = Guard(job.settings.privacy, key, f"{party.name} alone")
            course = _course(job, joined, [party], folder / "alone" / party.name, guard)
            alone[party.name] = course.run(phase(f"{party.name} alone", epochs))
            party.restore(fresh)
            party.effort = effort_of(job, len(parties))
    guard = Guard(job.settings.privacy, key, TOGETHER)
    course = _course(job, joined, parties, folder / TOGETHER, guard)
    told = phase(f"{title}, {len(parties)} parties together", epochs)
    together = course.run(told)
    leave(job, joined, parties, course.server, folder / "parties")
    return _summary(job, joined, alone, together, guard)


def _key(job: VerticalJob, folder: Path) -> str:
    """Of the noise; "" without noise."""
    privacy = job.settings.privacy
    if not privacy.noise:
        return ""
    if privacy.randomness == "seed":
        return randomness.of_seed(job.settings.run.seed)
    return randomness.kept(folder)


def _summary(
    job: VerticalJob,
    joined: Entities,
    alone: dict[str, Measured],
    together: Measured,
    guard: Guard,
) -> Plain:
    parties: dict[str, Plain] = {}
    for name, section in job.speaking.items():
        own = alone.get(name)
        parties[name] = {
            "reads": section.text or list(section.columns or ()),
            "importance": together.importance[name],
            "without": together.without[name],
            "alone": own.accuracy if own else None,
            "left_out": joined.joined.left_out[name],
        }
    privacy: Plain = {"messages": together.messages}
    if job.settings.privacy.noise:
        privacy |= {"epsilon": guard.epsilon(), "delta": job.settings.privacy.delta}
    return {
        "method": job.settings.method.name,
        "seed": job.settings.run.seed,
        "entities": len(joined.labels),
        "train": len(joined.train),
        "test": len(joined.test),
        "classes": list(joined.classes),
        "majority": joined.majority,
        "accuracy": together.accuracy,
        "loss": together.loss,
        "skipped": together.skipped,
        **together.traffic.plain(),
        "privacy": privacy,
        "parties": parties,
    }
