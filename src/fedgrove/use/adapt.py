"""A client that arrives after a run: placed, measured at once, trained on its own data, it leaves
with an adapter.

Nothing of the run changes. The server's half answers from the run's last checkpoint as it would
answer a held-out client; the newcomer's half, its probe and its training run here, on its own rows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedgrove.adapters.tree import typed
from fedgrove.federation.federation import Client
from fedgrove.federation.load import holding_of
from fedgrove.federation.split import divided
from fedgrove.ground.errors import DataError, RunError
from fedgrove.ground.names import RULE, client_name, folder_of
from fedgrove.ground.plain import Plain
from fedgrove.methods.contract import ClientInfo
from fedgrove.methods.protocols import placed
from fedgrove.runs.leave import spending, write_adapter
from fedgrove.runs.parts import Parts, one_by_one
from fedgrove.runs.prepare import has_device
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.use.result import Result

if TYPE_CHECKING:
    from fedgrove.adapters.assembly import Assembly
    from fedgrove.federation.tasks.base import Example
    from fedgrove.job import Job
    from fedgrove.training.client import ClientHalf


@dataclass(frozen=True)
class Adapted:
    """What became of a newcomer. ``measures``, on its own test rows: ``{"zero-shot": …, "after 5
    epochs": …}``.
    """

    name: str
    path: Path  # its adapter directory
    method: str
    metric: str
    train: int  # its training and test examples
    test: int
    placed: str  # where the server put it, in words; "" where the method has no groups
    head: str  # what its classifier started from, in words; "" where the task has none
    measures: dict[str, dict[str, float]]
    privacy: Plain | None = None  # what its training cost of its examples' budget


@dataclass(frozen=True, eq=False)
class Arrived:
    """A newcomer as it is welcomed, before anything of its own is in its model."""

    result: Result
    parts: Parts
    half: ClientHalf
    assembly: Assembly  # of the welcome
    examples: Mapping[str, list[Example]]  # by split


#: makes a newcomer's model without a training step: its name among the measures, and the model
Way = Callable[[Arrived], "tuple[str, Assembly]"]


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run, ready to answer: its parts, and the server at its last round."""

    parts: Parts
    state: Any
    mean_head: Mapping[str, torch.Tensor] | None


def adapt(
    run: str | Path,
    data: str | Path,
    *,
    name: str | None = None,
    epochs: int = 5,
    seed: int | None = None,
    out: str | Path | None = None,
    way: Way | None = None,
) -> Adapted:
    """Adapt a finished run, of any method, to a new client.

    Args:
        run: the run's directory.
        data: the client's table (jsonl, csv, parquet) with the job's columns; it is split as the
            job splits.
        name: what to call the client; default the file's stem. A name of a client that trained is
            refused.
        epochs: passes over its training rows; 0 only places and measures it.
        seed: of the split, the probe and the training; default the run's own.
        out: the adapter's directory, a new one; default ``RUN/adapted/NAME``.
        way: what to do with the welcomed model instead of training (``use.prototypes``,
            ``pools.newcomer``).

    Raises ``FedgroveError``: the run is not finished, the table or the name cannot be used, the
    directory is taken.
    """
    result = Result(run)
    name = _name(result, Path(data), name)
    folder = _folder(Path(out) if out is not None else result.path / "adapted" / folder_of(name))
    job = result.job
    if seed is None:
        seed = job.run.seed
    else:
        seed = seed
    client = _client(name, Path(data), job, seed)
    finished = _open(result, job)
    parts = finished.parts
    half = parts.client_half(seed=seed)
    examples = parts.encode(client)
    info = ClientInfo(name, parts.method.setting.rank, len(client.train))
    guard = half.guard(info, {})  # of the job's example level: probe and training count

    state = parts.method.open(finished.state, job.run.rounds + 1)
    welcome = parts.welcome(state, finished.mean_head, info)
    offer = half.arrive(info, examples["train"], welcome, guard)
    assembly = half.personal(info, offer, {})
    measures = {"zero-shot": half.kernel.evaluate(half.deployed(assembly), examples["test"])}
    if way is not None:
        after, assembly = _by(way, Arrived(result, parts, half, assembly, examples))
        measures[after] = half.kernel.evaluate(half.deployed(assembly), examples["test"])
    elif epochs:
        penalty = half.penalty(info, offer, {})
        assembly = half.tune(info, assembly, examples["train"], epochs, penalty, guard)
        after = f"after {epochs} epoch{'s' * (epochs > 1)}"
        measures[after] = half.kernel.evaluate(half.deployed(assembly), examples["test"])
    spent = spending(parts, info, guard)
    write_adapter(parts, folder, assembly, client=name, privacy=spent)
    return Adapted(
        name=name,
        path=folder,
        method=parts.method.title,
        metric=parts.task.metric,
        train=len(client.train),
        test=len(client.test),
        placed=placed(offer["method"]),
        head=_head_words(parts, "head" in offer),
        measures=measures,
        privacy=spent,
    )


def _by(way: Way, arrived: Arrived) -> tuple[str, Assembly]:
    """Raises ``RunError`` where the job protects each example, whom such a way reads as they are."""
    if arrived.parts.job.privacy.example_level:
        raise RunError(
            f"{arrived.result.path} protects its examples (privacy.example_clip), and without training "
            "a model would be made of them as they are; adapt it with --how train."
        )
    return way(arrived)


def _name(
    result: Result,
    data: Path,
    name: str | None,
) -> str:
    chosen = unicodedata.normalize("NFC", data.stem if name is None else name)
    if client_name(chosen) != chosen:
        if name is None:
            where = f"The file name of {data}"
        else:
            where = f"--name {chosen!r}"
        raise DataError(f"{where} cannot name a client: use {RULE}; give another --name.")
    row = result.summary["clients"].get(chosen)
    if row is not None and not row.get("held_out"):
        raise RunError(
            f"The client '{chosen}' trained in {result.path} and has its adapter there; give "
            f"another --name."
        )
    return chosen


def _folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} exists already; name a new directory with --out, or another --name."
        )
    return folder


def _client(
    name: str,
    data: Path,
    job: Job,
    seed: int,
) -> Client:
    parts = divided(name, holding_of(data, job), job.data, seed)
    return Client(
        name,
        parts.train,
        parts.test,
        parts.validation,
        group=None,
        held_out=True,
    )


def trained_in(result: Result) -> list[ClientInfo]:
    """The clients that a run was trained on."""
    return [
        ClientInfo(name, row["rank"], row["examples"])
        for name, row in result.summary["clients"].items()
        if not row.get("held_out")
    ]


def reopened(result: Result, job: Job) -> Parts:
    """The run's parts, one client at a time; on the CPU where this machine lacks the run's device."""
    if not has_device(job.train.device):
        job = job.replace(train={"device": "cpu"})
    torch.set_num_threads(int(job.train.threads))
    return Parts.of(one_by_one(job), trained_in(result))


def _open(result: Result, job: Job) -> Finished:
    """The run's method at its last state, on the run's base."""
    server = Checkpoints(result.path / "checkpoints").load_server(kept=True)
    parts = reopened(result, job)
    state = typed(parts.method.State, server["state"])
    return Finished(parts, state, server["head"])


def _head_words(parts: Parts, offered: bool) -> str:
    mode = parts.head.mode
    if parts.task.writes:
        return ""
    if mode == "frozen":
        return "the frozen head that all clients share"
    if not offered:
        return (
            "an untrained one, so that zero-shot is chance: the run kept no mean of heads "
            "(federation.newcomer_head)"
        )
    if mode == "shared":
        return "the clients' shared head"
    return "the mean of the clients' own heads"
