"""The one assembly line: from a job to base, task, method, head policy, and the half that trains.

Every side of a run is built here: the local engine, Flower's server and its clients, a newcomer of
a finished run, a comparison that asks whether a method fits. So they cannot differ in what they are
built from, the job's privacy included.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedgrove.adapters.tree import typed
from fedgrove.federation.tasks import task_class
from fedgrove.federation.tasks.seq2seq import as_read
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.plain import Given
from fedgrove.ground.seeds import generator
from fedgrove.interop.copies import Copies
from fedgrove.interop.models import Base, HeadKind, head_kind, load_base, load_config, longest_input
from fedgrove.job.sections import TrainSection
from fedgrove.methods.contract import Setting
from fedgrove.methods.head import HeadPolicy
from fedgrove.methods.registry import method_class
from fedgrove.runs.origin import started
from fedgrove.training.client import ClientHalf
from fedgrove.training.frozen import FrozenLayers
from fedgrove.training.kernel import Kernel
from fedgrove.training.lanes import Lanes, lane_count

if TYPE_CHECKING:
    from fedgrove.federation.federation import Client
    from fedgrove.federation.tasks import Example, Task
    from fedgrove.job import Job
    from fedgrove.methods.contract import ClientInfo, Method
    from fedgrove.runs.engine import Ask
    from fedgrove.training.client import Watch

    Head = Mapping[str, torch.Tensor] | None


@dataclass(frozen=True, eq=False)
class Parts:
    """What a job is made of, wherever its clients are. The base is in memory once."""

    job: Job  # with every automatic choice made
    base: Base
    task: Task
    method: Method
    head: HeadPolicy
    #: what was written of the run's adapters, where one process writes all of them
    copies: Copies | None = None

    @classmethod
    def of(
        cls,
        job: Job,
        clients: Collection[ClientInfo],
        *,
        base: Base | None = None,
    ) -> Parts:
        """The parts of a job with its choices made. Raises ``JobError`` where they do not fit.

        Args:
            clients: those that train, as far as they are known here; a client knows itself.
            base: the job's, where it is loaded already.
        """
        if base is None:
            base = base_of(job)
        task = as_read(task_of(job), base.head)
        setting = setting_of(job, base, clients)
        method = method_class(job.method.name)(job.method.options, setting)
        return cls(
            job,
            base,
            task,
            method,
            head_policy(job, base, task),
        )

    def client_half(
        self,
        *,
        seed: int | None = None,
        watch: Watch | None = None,
        lanes: Lanes | None = None,
    ) -> ClientHalf:
        """What runs the client's half of the method, on kernels of its own.

        Args:
            seed: of the order of data and the like; default the run's.
            watch: sees each step, what is private included; of a simulation in one process.
            lanes: the kernels, where somebody else made them.
        """
        job = self.job
        if lanes is None:
            lanes = Lanes.on(
                self.base,
                self.task,
                job.train,
                dropout=job.lora.dropout,
                count=lane_count(job),
                threads=int(job.train.threads),
            )
        return ClientHalf(
            lanes.kernels[0],
            self.method,
            self.head,
            job.run.seed if seed is None else seed,
            job.run.rounds,
            job.privacy,
            lanes=lanes,
            watch=watch,
        )

    def welcome(self, state: Any, head: Head, info: ClientInfo) -> Ask:
        """The server's answers to a client that never trained: without a probe, and after one.

        Args:
            state: the method's, at the server, as ``Method.open`` gives it after the last round.
            head: the mean of the clients' heads, where one is kept.
        """

        def ask(probe: Given | None) -> Given:
            if probe is None:
                found = None
            else:
                found = typed(self.method.Probed, probe)
            content = self.method.welcome(state, info, found)
            return self.head.beside(content, head, newcomer=True)

        return ask

    def encode(self, client: Client) -> dict[str, list[Example]]:
        """A client's splits as the task's examples."""
        encoded = {}
        for split in ("train", "test", "validation"):
            try:
                encoded[split] = self.task.encode(getattr(client, split), self.base.processor)
            except DataError as error:
                raise DataError(f"client {client.name!r}, {split} split: {error}") from error
        return encoded


def evaluator(base: Base, task: Task) -> Kernel:
    """A kernel that is there to read and to measure, not to train."""
    return Kernel(base, task, TrainSection())


def one_by_one(job: Job) -> Job:
    """The job where clients train one after the other, each alone in its batch."""
    return job.replace(train={"cohort": 1})


def task_of(job: Job) -> Task:
    return task_class(job.data).of(job.data)


def base_of(job: Job) -> Base:
    """Raises ``JobError`` where the job asks for longer texts than the model holds."""
    config = load_config(job.model.name, job.model.revision)
    task = task_of(job)
    head: HeadKind = "lm" if task.writes else job.model.head
    head = head_kind(config, head)
    task = as_read(task, head)
    limit = longest_input(config)
    if limit is not None:
        _refuse_too_long(task, job.model.name, limit)
    base = load_base(
        job.model.name,
        revision=job.model.revision,
        task=task.name,
        head=head,
        classes=task.outputs,
        targets=job.lora.targets,
        dtype=getattr(torch, job.train.dtype),
        device=job.train.device,
        seed=job.run.seed,
        gradient_checkpointing=job.train.gradient_checkpointing,
        quantize=job.model.quantize,
    )
    return started(job, base, drawn_head(job, base, task))


def _refuse_too_long(task: Task, model: str, limit: int) -> None:
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


def setting_of(job: Job, base: Base, clients: Collection[ClientInfo]) -> Setting:
    """R is the job's global rank, or the one rank of a method that needs equal ones."""
    rank = job.lora.rank or 1
    if method_class(job.method.name).ranks == "equal":
        rank = next(iter(clients)).rank
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
        rslora=job.lora.rslora,
        norms=FrozenLayers(base).norms() if job.lora.dora else None,
    )


def drawn_head(job: Job, base: Base, task: Task) -> dict[str, torch.Tensor]:
    """The model's own, tensors [any shape] by name, or a draw from the seed, as the task's
    ``new_head``; a task without a head has an empty one.
    """
    return base.stock_head or task.new_head(base.hidden, generator(job.run.seed, "head"))


def head_policy(job: Job, base: Base, task: Task) -> HeadPolicy:
    """One head for all clients to begin with: that of the adapter that the run starts from, or a
    draw.
    """
    initial = base.start_head or drawn_head(job, base, task)
    task.check_head(initial)
    return HeadPolicy(job.federation.head, initial, newcomers=job.federation.newcomer_head is True)
