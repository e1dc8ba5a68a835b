"""A client that arrives after a run: placed, measured at once, trained on its own data, it leaves
with an adapter.

Nothing of the run changes. The server's half answers from the run's last checkpoint as it would
answer a held-out client; the newcomer's half, its probe and its training run here, on its own rows.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
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
from fedgrove.methods.contract import ClientInfo
from fedgrove.methods.protocols import placed
from fedgrove.methods.registry import method_class
from fedgrove.runs.finish import write_adapter
from fedgrove.runs.prepare import base_of, encode, head_policy, setting_of, task_of
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.training.client import ClientHalf
from fedgrove.training.kernel import Kernel
from fedgrove.use.result import Result

if TYPE_CHECKING:
    from fedgrove.federation.tasks import Task
    from fedgrove.interop.models import Base
    from fedgrove.job import Job
    from fedgrove.methods.contract import Method
    from fedgrove.methods.head import HeadPolicy


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


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run, ready to answer."""

    job: Job
    base: Base
    task: Task
    method: Method
    head: HeadPolicy
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

    Raises ``FedgroveError``: the run is not finished, the table or the name cannot be used, the
    directory is taken.
    """
    result = Result(run)
    name = _name(result, Path(data), name)
    folder = _folder(Path(out) if out is not None else result.path / "adapted" / folder_of(name))
    job = result.job
    seed = job.run.seed if seed is None else seed
    client = _client(name, Path(data), job, seed)
    finished = _open(result, job)
    method, head, task, base = finished.method, finished.head, finished.task, finished.base
    train, dropout = finished.job.train, finished.job.lora.dropout
    kernel = Kernel(base, task, train, dropout=dropout)
    half = ClientHalf(kernel, method, head, seed, job.run.rounds)
    examples = encode(client, task, base)
    info = ClientInfo(name, method.setting.rank, len(client.train))

    state = method.open(finished.state, job.run.rounds + 1)

    def ask(probe: Mapping[str, Any] | None) -> Mapping[str, Any]:
        found = None if probe is None else typed(method.Probed, probe)
        return head.beside(method.welcome(state, info, found), finished.mean_head, newcomer=True)

    offer = half.arrive(info, examples["train"], ask)
    assembly = half.personal(info, offer, {})
    measures = {"zero-shot": half.kernel.evaluate(half.deployed(assembly), examples["test"])}
    if epochs:
        penalty = half.penalty(info, offer, {})
        assembly = half.tune(info, assembly, examples["train"], epochs, penalty)
        after = f"after {epochs} epoch{'s' * (epochs > 1)}"
        measures[after] = half.kernel.evaluate(half.deployed(assembly), examples["test"])
    write_adapter(finished, folder, assembly, client=name)
    return Adapted(
        name=name,
        path=folder,
        method=method.title,
        metric=task.metric,
        train=len(client.train),
        test=len(client.test),
        placed=placed(offer["method"]),
        head=_head_words(finished, "head" in offer),
        measures=measures,
    )


def _name(result: Result, data: Path, name: str | None) -> str:
    chosen = unicodedata.normalize("NFC", data.stem if name is None else name)
    if client_name(chosen) != chosen:
        where = f"The file name of {data}" if name is None else f"--name {chosen!r}"
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


def _client(name: str, data: Path, job: Job, seed: int) -> Client:
    parts = divided(name, holding_of(data, job), job.data, seed)
    return Client(name, parts.train, parts.test, parts.validation, group=None, held_out=True)


def _open(result: Result, job: Job) -> Finished:
    """The run's method at its last state, on the run's base; on the CPU where this machine lacks
    the run's device.
    """
    if (job.train.device == "cuda" and not torch.cuda.is_available()) or (
        job.train.device == "mps" and not torch.backends.mps.is_available()
    ):
        job = job.replace(train={"device": "cpu"})
    torch.set_num_threads(int(job.train.threads))
    server = Checkpoints(result.path / "checkpoints").load_server()
    rows = result.summary["clients"]
    trained = {
        name: ClientInfo(name, row["rank"], row["examples"])
        for name, row in rows.items()
        if not row.get("held_out")
    }
    base, task = base_of(job), task_of(job)
    method = method_class(job.method.name)(job.method.options, setting_of(job, base, trained))
    state = typed(method.State, server["state"])
    head = head_policy(job, base, task)
    return Finished(job, base, task, method, head, state, server["head"])


def _head_words(finished: Finished, offered: bool) -> str:
    if finished.task.writes:
        return ""
    if finished.head.mode == "frozen":
        return "the frozen head that all clients share"
    if offered:
        return (
            "the clients' shared head"
            if finished.head.mode == "shared"
            else "the mean of the clients' own heads"
        )
    return "an untrained one, so that zero-shot is chance: the run kept no mean of heads (federation.newcomer_head)"
