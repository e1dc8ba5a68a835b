"""The choices that a job leaves to the machine and to the data, and who its clients are. Nothing is
written here.

Every key that is marked ``Automatic`` (``ground.marks``) is decided here, but for ``train.cohort``,
which only the local engine has a use for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from fedgrove.federation import Federation, build
from fedgrove.federation.tasks import task_class, task_name
from fedgrove.ground.errors import JobError
from fedgrove.methods.contract import ClientInfo
from fedgrove.methods.registry import method_class
from fedgrove.runs.origin import digest_of

if TYPE_CHECKING:
    from fedgrove.federation.federation import Client
    from fedgrove.job import Job


@dataclass(frozen=True, eq=False)
class Population:
    """Clients whose data are all here: a simulation's."""

    federation: Federation
    clients: dict[str, ClientInfo]  # those that train, in name order
    held_out: dict[str, ClientInfo]

    @property
    def everyone(self) -> dict[str, ClientInfo]:
        return {**self.clients, **self.held_out}

    @cached_property
    def fingerprint(self) -> str:
        """Of the data: a resumed run must see the same."""
        return fingerprint_of(self.federation)


def settle(job: Job) -> tuple[Job, Population]:
    """The job with what machine and data decide, and its clients. Raises ``FedgroveError``.

    The process gets the job's number of threads.
    """
    job = machine_choices(job.resolved())
    torch.set_num_threads(int(job.train.threads))
    federation = build(job)
    job = data_choices(job, federation)
    clients, held_out = client_infos(job, federation)
    return job, Population(federation, clients, held_out)


def machine_choices(job: Job) -> Job:
    """Device, precision, threads and the evaluation's batch, where the job leaves them to the
    machine.
    """
    given = job.train
    train: dict[str, Any] = {}
    device: str = given.device
    if device == "auto":
        device = train["device"] = best_device()
    elif not has_device(device):
        raise JobError(
            f'train.device = "{device}", but torch finds no {device.upper()} device here; set it '
            f'to "auto" or "cpu".'
        )
    if given.dtype == "auto":
        fast = fast_in_bfloat16(device) and job.model.head == "pooled" and not job.model.adapter
        if fast:
            train["dtype"] = "bfloat16"
        else:
            train["dtype"] = "float32"
    if given.threads == "auto":
        train["threads"] = min(cores(), 16)  # more threads than that slow small models down
    if given.eval_batch_size == "auto":
        # logits of a large vocabulary take the memory that vectors of a hidden size do not
        if task_class(job.data).writes:
            train["eval_batch_size"] = 64
        else:
            train["eval_batch_size"] = 128
    if train:
        return job.replace(train=train)
    return job


def best_device() -> str:
    return next(device for device in ("cuda", "mps", "cpu") if has_device(device))


def has_device(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_available()
    if device == "mps":
        return torch.backends.mps.is_available()
    return True


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fast_in_bfloat16(device: str) -> bool:
    """Whether the device multiplies in bfloat16 by itself; elsewhere it is emulated, and slower
    than float32.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False


def data_choices(job: Job, federation: Federation) -> Job:
    """The task, the classes and whether heads are kept, where the job leaves them to the data."""
    rows = [row for client in federation.training for row in client.train]
    settled = task_class(job.data).settled(job.data, rows)
    data: dict[str, Any] = {"task": task_name(job.data), **settled}
    if federation.labels:
        data["labels"] = list(federation.labels)
    head = newcomer_head(job, bool(federation.held_out))
    job = job.replace(data=data, federation={"newcomer_head": head})
    if job.model.adapter_digest is None:
        return job.replace(model={"adapter_digest": digest_of(job)})
    return job


def newcomer_head(job: Job, held_out: bool) -> bool:
    """``auto`` made definite: a mean head is kept where held-out clients will ask for one."""
    chosen = job.federation.newcomer_head
    if chosen == "auto":
        return held_out
    return bool(chosen)


def client_infos(
    job: Job,
    federation: Federation,
) -> tuple[dict[str, ClientInfo], dict[str, ClientInfo]]:
    """(those that train, those held out), with ranks as the job and the method want them."""
    names = [client.name for client in federation.clients]
    ranks = fitting_ranks(job, job.ranks(names))

    def infos(clients: Iterable[Client]) -> dict[str, ClientInfo]:
        found = {}
        for client in clients:
            found[client.name] = ClientInfo(client.name, ranks[client.name], len(client.train))
        return found

    return infos(federation.training), infos(federation.held_out)


def fitting_ranks(job: Job, ranks: dict[str, int]) -> dict[str, int]:
    """The ranks as the method wants them: as they are, or one for all. Raises ``JobError`` where
    the job must say.
    """
    chosen, how = method_class(job.method.name), job.method.uniform_rank
    different = sorted(set(ranks.values()))
    if chosen.ranks != "equal" or len(different) <= 1:
        return ranks
    if how is None:
        raise JobError(
            f"federation.ranks gives different ranks ({', '.join(map(str, different))}), but "
            f'{chosen.title} needs equal ones; set method.uniform_rank = "min" or "max", or '
            f"choose another method."
        )
    if how == "min":
        rank = different[0]
    else:
        rank = different[-1]
    return dict.fromkeys(ranks, rank)


def fingerprint_of(federation: Federation) -> str:
    """SHA-256 over every client's rows and splits."""
    digest = hashlib.sha256()
    for client in federation.clients:
        row = [client.name, client.held_out, client.train, client.test, client.validation]
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(text.encode())
    return digest.hexdigest()
