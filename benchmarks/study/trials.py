"""One run of the study, cached: a small JSON file with the measures per client and round.

A file is named after what the run depends on (the field's job as written, the method with its
options, the seed, ``PROTOCOL``), so a changed job is another file and nothing stale is ever read.
Keys that only say where and how fast a run goes (``run.out``, ``train.threads`` …) do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fedgrove as fg
from fedgrove.compare.entries import Entry, parse_methods
from fedgrove.ground.files import write_text
from fedgrove.ground.versions import versions
from fedgrove.methods.protocols import ServerArtefacts
from fedgrove.runs.directory import RunDirectory
from fedgrove.runs.loop import Loop
from fedgrove.runs.records import Records
from fedgrove.start import opener
from fedgrove.tracking import metrics
from fedgrove.tracking.callback import Callbacks
from study.fields import Field

#: raise it when the study's own code changes what a run means; all runs are then made anew
PROTOCOL = 1
#: of the machine, not of the run
UNCOUNTED = {"run": {"out", "checkpoint_every"}, "train": {"threads", "device", "memory"}}
#: artefacts of a method that the study reads
ARTEFACTS = ("tree.json", "clusters.json", "grove.json")
#: "base" is local training that leaves the adapters where they are: the frozen base, with a head
#: where the task has one
BASE = "base"
POOLED = "pooled"


@dataclass(frozen=True)
class Trial:
    """One method on one field with one seed. ``changes`` are further ``key=value`` settings."""

    field: Field
    entry: Entry
    seed: int
    changes: tuple[str, ...] = ()

    @cached_property
    def settings(self) -> list[str]:
        """What is set on top of the field's job."""
        own = [*self.field.changes, *self.changes]
        if self.entry.method == POOLED:
            return [*own, "method.name=fedit", "federation.ranks=[]", f"run.seed={self.seed}"]
        if self.entry.method != BASE:
            return [*own, *self.entry.settings, f"run.seed={self.seed}"]
        return [*own, "method.name=local", *_frozen(self.written), f"run.seed={self.seed}"]

    @cached_property
    def written(self) -> dict[str, Any]:
        """The job's file."""
        return tomllib.loads(self.field.file.read_text(encoding="utf-8"))

    @cached_property
    def digest(self) -> str:
        """Of all that the run depends on."""
        written = {section: dict(keys) for section, keys in self.written.items()}
        for section, keys in UNCOUNTED.items():
            for key in keys & set(written.get(section, {})):
                del written[section][key]
        written.pop("method", None)
        content: list[Any] = [PROTOCOL, written, self.settings]
        if self.field.source is not None:
            content.append(self.field.source.version)
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def file(self) -> str:
        """Of its record, in a cache."""
        return f"{self.field.name}/{self.entry.slug}-seed{self.seed}-{self.digest}.json"

    @property
    def label(self) -> str:
        tried = f" ({', '.join(self.changes)})" if self.changes else ""
        return f"{self.field.name}: {self.entry.label}, seed {self.seed}{tried}"

    def job(self, folder: Path) -> fg.Job:
        """The job, on one thread; ``folder`` holds what the field's source made."""
        machine = ["train.threads=1", "run.checkpoint_every=3"]
        made = self.field.settings(folder)
        return fg.Job.load(self.field.file).override([*made, *self.settings, *machine])


def _frozen(written: dict[str, Any]) -> list[str]:
    """Adapters stay at zero; a head learns as in every other run."""
    train = written.get("train", {})
    settings = ["train.lr=1e-30"]
    if (
        written.get("data", {}).get("task") != "generate"
        and "max_new_tokens" not in written["data"]
    ):
        settings.append(f"train.head_lr={train.get('head_lr', train.get('lr', 1e-3))}")
    return settings


def trial(field: Field, method: str, seed: int, changes: Sequence[str] = ()) -> Trial:
    """A trial from a method as written on the command line: ``fedtreelora[fixed_k=4]``."""
    (entry,) = parse_methods([method])
    return Trial(field, entry, seed, tuple(changes))


@dataclass
class Record:
    """What is kept of one run. ``rounds``: ``{round: {client: {measure: value}}}``."""

    field: str
    method: str
    seed: int
    settings: list[str]
    metric: str
    clients: dict[str, dict[str, Any]]
    rounds: dict[str, dict[str, dict[str, float]]]
    train: dict[str, float]
    bytes: dict[str, int]
    steps: dict[str, int]
    artefacts: dict[str, Any]
    seconds: float
    cpu_seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""


def known(wanted: Trial, cache: Path) -> Record | None:
    """The cached run, or None."""
    path = cache / wanted.file
    if not path.is_file():
        return None
    return Record(**json.loads(path.read_text(encoding="utf-8")))


def made(wanted: Trial, cache: Path, scratch: Path) -> Record:
    """The run, from the cache or made now in ``scratch`` (resumed where it was stopped)."""
    if (found := known(wanted, cache)) is not None:
        return found
    folder = scratch / Path(wanted.file).with_suffix("")
    job = wanted.job(_source(wanted, scratch))
    began, cpu = time.monotonic(), time.process_time()
    if wanted.entry.method == POOLED:
        record = pooled(wanted, job, folder)
    elif wanted.field.planted is not None:
        record = _rounds(wanted, job, folder)
    else:
        record = _record(wanted, fg.run(job, folder, resume=folder.exists()))
    record.seconds = round(time.monotonic() - began, 1)
    record.cpu_seconds = round(time.process_time() - cpu, 1)
    path = cache / wanted.file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(vars(record), indent=0, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return record


def _rounds(wanted: Trial, job: fg.Job, folder: Path) -> Record:
    """The rounds of a run without its finish, whose adapters, texts and report cost more than the
    training of a tiny model and are read by nobody.
    """
    directory = RunDirectory(folder)
    resume = folder.exists()
    job = directory.admit(job, resume=resume, longer=True)
    watch = Callbacks(())
    with (
        directory.lock(),
        opener("local")(job, directory, resume=resume, watch=watch) as stage,
    ):
        directory.open(stage, resume=resume)
        loop = Loop(stage, Records.at(directory.path, watch, stage.lab))
        loop.rounds()
        found: dict[str, Any] = {}
        if isinstance(stage.method, ServerArtefacts):
            found = stage.method.artefacts(loop.state)
        clients = {
            name: {"examples": info.examples, "rank": info.rank}
            for name, info in stage.clients.items()
        }
        metric = stage.task.metric
    return _read(wanted, metrics.read(folder / "metrics.jsonl"), metric, clients, found)


def pooled(wanted: Trial, job: fg.Job, folder: Path) -> Record:
    """One adapter trained on everybody's rows in one place, as the row of that name in `fedgrove
    compare` is; measured on each client's own test rows.
    """
    from fedgrove.engines import pooled as one_machine

    everybodys = one_machine.pooled(job)
    engine = one_machine.all_rows
    return _record(wanted, fg.run(everybodys, folder, resume=folder.exists(), engine=engine))


def _source(wanted: Trial, scratch: Path) -> Path:
    """The folder with what the field's source makes for the trial's seed, made once."""
    source = wanted.field.source
    if source is None:
        return scratch
    folder = scratch / "sources" / f"{wanted.field.name}-{source.version}-seed{wanted.seed}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        source.make(partial, wanted.seed)
        partial.rename(folder)
    return folder


def _record(wanted: Trial, result: fg.Result) -> Record:
    summary = result.summary
    artefacts = {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(result.path.glob("*.json"))
        if path.name in ARTEFACTS
    }
    return _read(wanted, result.metrics(), summary["metric"], summary["clients"], artefacts)


def _read(
    wanted: Trial,
    lines: Sequence[dict[str, Any]],
    metric: str,
    clients: dict[str, dict[str, Any]],
    artefacts: dict[str, Any],
) -> Record:
    """What is kept of a run, from the lines of its ``metrics.jsonl``."""
    rounds: dict[str, dict[str, dict[str, float]]] = {}
    losses: dict[str, list[float]] = {}
    up: dict[str, int] = {}
    steps: dict[str, int] = {}
    for line in lines:
        number = str(line["round"])
        if line["split"] == "train":
            losses.setdefault(number, []).append(line["loss"])
            up[number] = up.get(number, 0) + line["bytes_up"] + line["bytes_down"]
            steps[number] = steps.get(number, 0) + line["steps"]
        elif line["split"] == "test":
            measures = {
                key: round(value, 6)
                for key, value in line.items()
                if key not in ("round", "client", "split", "examples", "perplexity")
                and isinstance(value, int | float)
            }
            rounds.setdefault(number, {})[line["client"]] = measures
    return Record(
        field=wanted.field.name,
        method=wanted.entry.label,
        seed=wanted.seed,
        settings=wanted.settings,
        metric=metric,
        clients=clients,
        rounds=rounds,
        train={number: sum(values) / len(values) for number, values in losses.items()},
        bytes=up,
        steps=steps,
        artefacts=artefacts,
        seconds=0.0,
        cpu_seconds=0.0,
        versions=versions(),
        machine=f"{os.cpu_count()} cores",
    )
