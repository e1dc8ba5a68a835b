"""From a job to everything that a run needs: federation, base, method, engine. Nothing is written
here.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedgrove.engines.local import LocalEngine
from fedgrove.federation import Federation, build
from fedgrove.federation.tasks import Task, task_class, task_name
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base, load_config, longest_input
from fedgrove.methods.contract import ClientInfo, Method, Setting
from fedgrove.methods.head import HeadPolicy
from fedgrove.methods.registry import method_class
from fedgrove.training.client import ClientHalf
from fedgrove.training.cohort_size import cohort_size, row_by_row
from fedgrove.training.lanes import Lanes, lane_count

if TYPE_CHECKING:
    from fedgrove.federation.federation import Client
    from fedgrove.job import Job


@dataclass(frozen=True, eq=False)
class Prepared:
    """A job with every automatic choice made, and what it runs on."""

    job: Job
    federation: Federation
    base: Base
    task: Task
    method: Method
    head: HeadPolicy
    half: ClientHalf
    engine: LocalEngine
    clients: dict[str, ClientInfo]  # those that train, in name order
    held_out: dict[str, ClientInfo]
    fingerprint: str  # of the data: a resumed run must see the same

    @property
    def splits(self) -> tuple[str, ...]:
        """What an evaluated round measures: the test split, and the validation split where the job
        holds one out.
        """
        return ("test", "validation") if self.job.data.validation_fraction else ("test",)


def prepare(job: Job) -> Prepared:
    """Resolve the job, load what it names, and check that it fits together. Raises
    ``FedgroveError``.
    """
    job = machine_choices(job.resolved())
    torch.set_num_threads(int(job.train.threads))
    federation = build(job)
    job = job.replace(
        data=decided(job, federation),
        federation={"newcomer_head": newcomer_head(job, federation)},
    )
    clients, held_out = client_infos(job, federation)
    base = base_of(job)
    task = task_of(job)
    setting = setting_of(job, base, clients)
    if job.train.cohort == "auto":
        job = job.replace(
            train={"cohort": cohort_size(job, base, setting, len(clients), lane_count(job))}
        )
    elif job.train.cohort > 1 and not row_by_row(base):
        raise JobError(
            f"train.cohort = {job.train.cohort}, but {job.model.name} divides its images into "
            f"windows, so clients "
            'cannot share a batch; set it to 1 or "auto".'
        )
    chosen = method_class(job.method.name)
    method = chosen(job.method.options, setting)
    method.check([*clients.values(), *held_out.values()])
    head = head_policy(job, base, task)
    kernels = Lanes.on(
        base,
        task,
        job.train,
        dropout=job.lora.dropout,
        count=lane_count(job),
        threads=int(job.train.threads),
    )
    half = ClientHalf(
        kernels.kernels[0], method, head, job.run.seed, job.run.rounds, job.privacy, lanes=kernels
    )
    data = {client.name: encode(client, task, base) for client in federation.clients}
    engine = LocalEngine(job, half, {**clients, **held_out}, data, held_out)
    return Prepared(
        job,
        federation,
        base,
        task,
        method,
        head,
        half,
        engine,
        clients,
        held_out,
        fingerprint_of(federation),
    )


def machine_choices(job: Job) -> Job:
    """Device, precision, threads and the evaluation's batch, where the job leaves them to the
    machine.
    """
    train: dict[str, Any] = {}
    device = job.train.device
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        train["device"] = device
    elif device == "cuda" and not torch.cuda.is_available():
        raise JobError(
            'train.device = "cuda", but torch finds no CUDA device here; set it to "auto" or "cpu".'
        )
    elif device == "mps" and not torch.backends.mps.is_available():
        raise JobError(
            'train.device = "mps", but torch finds no MPS device here; set it to "auto" or "cpu".'
        )
    if job.train.dtype == "auto":
        train["dtype"] = (
            "bfloat16" if fast_in_bfloat16(device) and job.model.head == "pooled" else "float32"
        )
    if job.train.threads == "auto":
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        train["threads"] = min(cores, 16)  # more threads than that slow small models down
    if job.train.eval_batch_size == "auto":
        # logits of a large vocabulary take the memory that vectors of a hidden size do not
        train["eval_batch_size"] = 64 if task_class(job.data).writes else 128
    return job.replace(train=train) if train else job


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


def newcomer_head(job: Job, federation: Federation) -> bool:
    """``auto`` made definite: a mean head is kept where held-out clients will ask for one."""
    chosen = job.federation.newcomer_head
    return bool(federation.held_out) if chosen == "auto" else bool(chosen)


def client_infos(
    job: Job, federation: Federation
) -> tuple[dict[str, ClientInfo], dict[str, ClientInfo]]:
    """(those that train, those held out), with ranks as the job and the method want them."""
    ranks = fitting_ranks(job, job.ranks([client.name for client in federation.clients]))
    infos = {c.name: ClientInfo(c.name, ranks[c.name], len(c.train)) for c in federation.clients}
    return (
        {c.name: infos[c.name] for c in federation.training},
        {c.name: infos[c.name] for c in federation.held_out},
    )


def fitting_ranks(job: Job, ranks: dict[str, int]) -> dict[str, int]:
    """The ranks as the method wants them: as they are, or one for all. Raises ``JobError`` where
    the job must say.
    """
    chosen = method_class(job.method.name)
    if chosen.ranks == "equal" and len(set(ranks.values())) > 1:
        how = job.method.uniform_rank
        if how is None:
            raise JobError(
                f"federation.ranks gives different ranks "
                f"({', '.join(map(str, sorted(set(ranks.values()))))}), but "
                f'{chosen.title} needs equal ones; set method.uniform_rank = "min" or "max", or '
                f"choose another method."
            )
        rank = min(ranks.values()) if how == "min" else max(ranks.values())
        return dict.fromkeys(ranks, rank)
    return ranks


def setting_of(job: Job, base: Base, clients: dict[str, ClientInfo]) -> Setting:
    """R is the job's global rank, or the one rank of a method that needs equal ones."""
    rank = job.lora.rank or 1
    if method_class(job.method.name).ranks == "equal":
        rank = next(iter(clients.values())).rank
    smallest = min(min(site.in_features, site.out_features) for site in base.sites.values())
    if rank > smallest:
        raise JobError(
            f"lora.rank = {rank} is above {smallest}, the smallest side of an adapted layer of "
            f"{base.name}; "
            f"lower it to {smallest} or less."
        )
    return Setting(
        sites=base.sites,
        rank=rank,
        alpha=float(job.lora.alpha or 2 * rank),
        rounds=job.run.rounds,
        seed=job.run.seed,
        scaling=job.lora.scaling,
    )


def base_of(job: Job) -> Base:
    limit = longest_input(load_config(job.model.name, job.model.revision))
    task = task_of(job)
    if limit is not None:
        _check_length(task, job.model.name, limit)
    targets = job.lora.targets
    return load_base(
        job.model.name,
        revision=job.model.revision,
        task=task.name,
        head="lm" if task.writes else job.model.head,
        classes=task.outputs,
        targets=targets if targets == "auto" else list(targets),
        dtype=getattr(torch, job.train.dtype),
        device=job.train.device,
        seed=job.run.seed,
        gradient_checkpointing=job.train.gradient_checkpointing,
        quantize=job.model.quantize,
    )


def _check_length(task: Task[Any], model: str, limit: int) -> None:
    """Whether the model can hold what the job lets it read and write."""
    for key, count in task.tokens.items():
        if count > limit:
            raise JobError(
                f"data.{key} = {count} is more than {model} reads; set it to {limit} or less."
            )
    if sum(task.tokens.values()) > limit:
        said = " and ".join(f"data.{key} = {count}" for key, count in task.tokens.items())
        raise JobError(
            f"{said} are together more than the {limit} tokens that {model} can hold; lower one of "
            "them."
        )


def decided(job: Job, federation: Federation) -> dict[str, Any]:
    """The keys of ``[data]`` that its rows decide: the task, and the classes where it has any."""
    task = {"task": task_name(job.data)}
    return task | {"labels": list(federation.labels)} if federation.labels else task


def task_of(job: Job) -> Task[Any]:
    return task_class(job.data).of(job.data)


def head_policy(job: Job, base: Base, task: Task) -> HeadPolicy:
    """The head's one initial draw for all clients, from the seed; a task without a head has an
    empty one.
    """
    initial = base.stock_head or task.new_head(base.hidden, generator(job.run.seed, "head"))
    return HeadPolicy(job.federation.head, initial, newcomers=job.federation.newcomer_head is True)


def encode(client: Client, task: Task, base: Base) -> dict[str, list[dict[str, Any]]]:
    """A client's splits as the task's examples."""
    encoded = {}
    for split in ("train", "test", "validation"):
        try:
            encoded[split] = task.encode(getattr(client, split), base.processor)
        except DataError as error:
            raise DataError(f"client {client.name!r}, {split} split: {error}") from error
    return encoded


def fingerprint_of(federation: Federation) -> str:
    """SHA-256 over every client's rows and splits."""
    digest = hashlib.sha256()
    for client in federation.clients:
        row = [client.name, client.held_out, client.train, client.test, client.validation]
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()
