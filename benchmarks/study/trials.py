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

HERE = Path(__file__).resolve().parent
JOBS = HERE.parent.parent / "jobs"
RUNS = HERE.parent / "results" / "evidence" / "runs"
#: raise it when the study's own code changes what a run means; all runs are then made anew
PROTOCOL = 1
#: of the machine, not of the run
UNCOUNTED = {"run": {"out", "checkpoint_every"}, "train": {"threads", "device", "memory"}}
#: artefacts of a method that the study reads
ARTEFACTS = ("tree.json", "tiers.json", "clusters.json", "hilora.json", "grove.json")


@dataclass(frozen=True)
class Trial:
    """One method on one field with one seed. ``changes`` are further ``key=value`` settings."""

    field: str
    file: str
    entry: Entry
    seed: int
    changes: tuple[str, ...] = ()

    @cached_property
    def settings(self) -> list[str]:
        return [*self.changes, *self.entry.settings, f"run.seed={self.seed}"]

    @cached_property
    def digest(self) -> str:
        written = tomllib.loads((JOBS / self.file).read_text(encoding="utf-8"))
        for section, keys in UNCOUNTED.items():
            for key in keys & set(written.get(section, {})):
                del written[section][key]
        written.pop("method", None)
        content = [PROTOCOL, written, self.settings]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def path(self) -> Path:
        return RUNS / self.field / f"{self.entry.slug}-seed{self.seed}-{self.digest}.json"

    @property
    def label(self) -> str:
        return f"{self.field}: {self.entry.label}, seed {self.seed}"

    def job(self) -> fg.Job:
        machine = ["train.threads=1", f"run.checkpoint_every={10**6}"]
        return fg.Job.load(JOBS / self.file).override([*self.settings, *machine])


def trial(name: str, file: str, method: str, seed: int, changes: Sequence[str] = ()) -> Trial:
    """A trial from a method as written on the command line: ``fedtreelora[fixed_k=4]``."""
    (entry,) = parse_methods([method])
    return Trial(name, file, entry, seed, tuple(changes))


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


def known(wanted: Trial) -> Record | None:
    """The cached run, or None."""
    if not wanted.path.is_file():
        return None
    return Record(**json.loads(wanted.path.read_text(encoding="utf-8")))


def made(wanted: Trial, scratch: Path) -> Record:
    """The run, from the cache or made now in ``scratch`` (resumed where it was stopped)."""
    if (found := known(wanted)) is not None:
        return found
    folder = scratch / wanted.field / wanted.path.stem
    shutil.rmtree(folder, ignore_errors=True)
    began, cpu = time.monotonic(), time.process_time()
    result = fg.run(wanted.job(), folder)
    record = _record(wanted, result, time.monotonic() - began, time.process_time() - cpu)
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    write_text(wanted.path, json.dumps(vars(record), indent=0, sort_keys=True) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return record


def _record(wanted: Trial, result: fg.Result, seconds: float, cpu: float) -> Record:
    rounds: dict[str, dict[str, dict[str, float]]] = {}
    losses: dict[str, list[float]] = {}
    up: dict[str, int] = {}
    steps: dict[str, int] = {}
    for line in result.metrics():
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
    summary = result.summary
    artefacts = {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(result.path.glob("*.json"))
        if path.name in ARTEFACTS
    }
    return Record(
        field=wanted.field,
        method=wanted.entry.label,
        seed=wanted.seed,
        settings=wanted.settings,
        metric=summary["metric"],
        clients=summary["clients"],
        rounds=rounds,
        train={number: sum(values) / len(values) for number, values in losses.items()},
        bytes=up,
        steps=steps,
        artefacts=artefacts,
        seconds=round(seconds, 1),
        cpu_seconds=round(cpu, 1),
        versions=versions(),
        machine=f"{os.cpu_count()} cores",
    )
