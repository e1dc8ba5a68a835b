"""Several clients in one batch on the one base: each keeps its own terms, data order, loss and
optimiser state.

What a member computes is what it would compute alone, up to rounding: the base sees one large
batch, every member's terms see that member's part of it, the losses are added up, and so each
gradient is that of its own loss. A large batch is what keeps a device busy when clients' own
batches are small.

Steps that do not fit run one by one: measuring steps, dropout (its draws would differ), folded
terms and left-out layers (they change the base for everyone), weights that depend on the input, a
stock head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgrove.adapters.adapter import Site
from fedgrove.adapters.assembly import Assembly, trained_parameters
from fedgrove.adapters.private import unseal
from fedgrove.federation.tasks import task_of
from fedgrove.federation.tasks.generate import Generate
from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import Step, Trained
from fedgrove.training.kernel import Clock, batch_order, some
from fedgrove.training.live import LiveAssembly
from fedgrove.training.profile import span

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Batch, Example
    from fedgrove.interop.models import Base
    from fedgrove.job import Job
    from fedgrove.methods.contract import Setting
    from fedgrove.privacy.example_dp import ExampleGuard
    from fedgrove.training.kernel import Kernel
    from fedgrove.training.lanes import Lanes


@dataclass(frozen=True, eq=False)
class Work:
    """One client's step of local work: the arguments of ``Kernel.train``."""

    step: Step
    examples: Sequence[Example]
    clock: Clock
    guard: ExampleGuard | None = None  # noise and clipping by example: such work runs alone


def train_together(lanes: Lanes, works: Sequence[Work]) -> list[Trained]:
    """What ``Kernel.train`` gives for each; those that can share a batch, one in each lane."""
    joined = [
        index
        for index, work in enumerate(works)
        if work.guard is None and joins(lanes.kernels[0], work.step)
    ]
    # dealt in turn: neighbours are often of one group, with texts of one length
    parts = [
        part for lane in range(len(lanes.kernels)) if (part := joined[lane :: len(lanes.kernels)])
    ]
    parts += [[index] for index in sorted(set(range(len(works))) - set(joined))]

    def train(kernel: Kernel, part: list[int]) -> list[Trained]:
        chosen = [works[index] for index in part]
        if len(chosen) > 1:
            return _train(kernel, chosen)
        return [kernel.train(work.step, work.examples, work.clock, work.guard) for work in chosen]

    done: dict[int, Trained] = {}
    for part, found in zip(parts, lanes.map(train, parts), strict=True):
        done.update(zip(part, found, strict=True))
    return [done[index] for index in range(len(works))]


def joins(kernel: Kernel, step: Step) -> bool:
    """Whether a step can share a batch with other clients' steps."""
    assembly = step.assembly
    return (
        step.measure == "train"
        and kernel.base.head != "stock"
        and not kernel.options.dropout
        and not assembly.folded
        and assembly.layers is None
        and assembly.mix.linear
        and trained_parameters(assembly) > 0
    )


@dataclass(eq=False)
class Member:
    """One client while it trains."""

    work: Work
    live: LiveAssembly
    order: Iterator[list[int]]
    examples: Sequence[Example]
    count: int  # optimiser steps
    total: float = 0.0


class Cohort:
    """Stands where a ``LiveAssembly`` stands in the kernel's hooks: each member's terms on its part
    of the batch.

    All members' factors stand side by side in two large products, between which what belongs to
    others is set to zero: a few calls instead of a few for each member, and ranks may differ.
    Frozen factors that several members have in common (an earlier tier, an update of the base)
    stand there once. They run in the base's precision, as under autocast; the masters that the
    optimiser moves keep theirs. Members run part after part where the ``base_delta`` of one has
    become a dense matrix.
    """

    def __init__(self) -> None:
        self.assembly = (
            Assembly()
        )  # nothing for all: no layers left out, weights that do not depend on the input
        self.lives: list[LiveAssembly] = []
        self.sizes: list[int] = []
        self._x: Tensor | None = None
        self._parts: Sequence[Tensor] = ()
        self._masks: dict[tuple[tuple[int, tuple[int, ...]], ...], Tensor] = {}
        self._packed = False

    def enter(self, lives: Sequence[LiveAssembly], sizes: Sequence[int], *, packed: bool) -> None:
        """The members of the batch in progress, and how many of its rows (packed: tokens) each
        has.
        """
        self.lives, self.sizes, self._packed = list(lives), list(sizes), packed
        self._x, self._parts, self._masks = None, (), {}

    def add(self, site: Site, x: Tensor, output: Tensor) -> Tensor:
        """The site's output with every member's terms added to its part."""
        if not any(live.delta is not None and site.name in live.delta.dense for live in self.lives):
            return self._add_masked(site, x, output)
        axis = 1 if self._packed else 0
        if x is not self._x:
            self._x, self._parts = x, x.split(self.sizes, axis)
        parts = zip(self.lives, self._parts, output.split(self.sizes, axis), strict=True)
        return torch.cat([live.add(site, own, out) for live, own, out in parts], axis)

    def _add_masked(self, site: Site, x: Tensor, output: Tensor) -> Tensor:
        blocks: dict[object, Block] = {}
        for number, live in enumerate(self.lives):
            for own, A, B in _factors(site, x, live, number):
                blocks.setdefault(own, Block(A, B, [])).members.append(number)
        if not blocks:
            return output
        down = torch.cat([block.A for block in blocks.values()]).to(x.dtype)
        up = torch.cat([block.B for block in blocks.values()], 1).T.to(output.dtype)
        belongs = tuple((len(block.A), tuple(block.members)) for block in blocks.values())
        inner = F.linear(x, down) * self._mask(belongs, x)
        more = torch.addmm(output.flatten(0, -2), inner.flatten(0, -2).to(output.dtype), up)
        return more.view(output.shape)

    def _mask(self, belongs: tuple[tuple[int, tuple[int, ...]], ...], x: Tensor) -> Tensor:
        """1 where a row's (packed: a token's) member has a block; ``belongs``: each block's rank
        and members.
        """
        if belongs not in self._masks:
            has = torch.zeros(len(self.lives), len(belongs), dtype=x.dtype)
            for column, (_, members) in enumerate(belongs):
                has[list(members), column] = 1
            ranks = torch.tensor([rank for rank, _ in belongs])
            mask = (
                has.repeat_interleave(ranks, 1)
                .repeat_interleave(torch.tensor(self.sizes), 0)
                .to(x.device)
            )
            self._masks[belongs] = mask[None] if self._packed else mask[:, None]
        return self._masks[belongs]


@dataclass(eq=False)
class Block:
    """Factors side by side with others', and who they run for."""

    A: Tensor
    B: Tensor
    members: list[int]


def _factors(
    site: Site, x: Tensor, live: LiveAssembly, number: int
) -> Iterator[tuple[object, Tensor, Tensor]]:
    """What a member runs at a site, scales and weights in B; the first is equal where two members
    run the same.
    """
    for product in live.products(site, x):
        term, factor = product.term, product.factor
        if term is None:
            assert live.assembly.base_delta is not None
            given = live.assembly.base_delta[site.name]
            yield (*_memory(given.A), *_memory(given.B), "update", factor), product.A, product.B
            continue
        own: tuple[object, ...] = (number, term.term.name)
        if (
            site.name not in term.diagonal
            and isinstance(factor, float)
            and not set("AB") & set(term.term.train)
        ):
            given = term.term.adapter[site.name]
            own = (term.term.name, *_memory(given.A), *_memory(given.B), term.term.unit, factor)
        yield own, product.A, product.B


def _memory(value: Tensor) -> tuple[object, ...]:
    """What two tensors that are the same numbers in the same place have in common."""
    value = unseal(value)
    return (value.data_ptr(), value.shape, value.stride())


def _train(kernel: Kernel, works: Sequence[Work]) -> list[Trained]:
    options = kernel.options
    members = [_member(kernel, work) for work in works]
    cohort = Cohort()
    groups: dict[tuple[float | None, int, float, float], list[Tensor]] = {}
    for member in members:  # one learning rate: one multiplier, and the same place in the schedule
        clock = member.work.clock
        for rate, leaves in member.live.groups.items():
            groups.setdefault((rate, member.count, clock.start, clock.end), []).extend(leaves)
    optimizer = kernel.optimizer([(rate, leaves) for (rate, *_), leaves in groups.items()])
    rates = [group["lr"] for group in optimizer.param_groups]
    for index in range(max(member.count for member in members)):
        active = [member for member in members if index < member.count]
        for group, rate, (_, count, start, end) in zip(
            optimizer.param_groups, rates, groups, strict=True
        ):
            group["lr"] = rate * kernel._factor(start + (end - start) * index / count)
        optimizer.zero_grad(
            set_to_none=True
        )  # a member that is done has no gradients, and does not move
        for _ in range(options.accumulation):
            _accumulate(kernel, cohort, active)
        with span("optimiser"):
            if options.clip > 0:
                for member in active:
                    nn.utils.clip_grad_norm_(member.live.leaves, options.clip)
            optimizer.step()
    return [Trained(m.live.trained(), m.total / m.count, m.count) for m in members]


def _member(kernel: Kernel, work: Work) -> Member:
    step, clock = work.step, work.clock
    examples = some(work.examples, step, clock)
    live = LiveAssembly(
        step.assembly,
        device=kernel.base.device,
        dtype=kernel.base.adapter_dtype,
        train=True,
        dropout=0.0,
    )
    draws = generator(clock.seed, *clock.keys, step.stream, "order")
    order = batch_order(len(examples), kernel.options.batch_size, draws)
    return Member(work, live, order, examples, kernel.steps(step, len(examples)))


def _accumulate(kernel: Kernel, cohort: Cohort, active: Sequence[Member]) -> None:
    """One batch of each active member, forward and backward."""
    share = 1 / kernel.options.accumulation
    with span("batches"):
        chosen = [[member.examples[i] for i in next(member.order)] for member in active]
        batch = kernel._batch([example for each in chosen for example in each])
    with kernel.together(
        cohort, [member.live for member in active], [len(each) for each in chosen], batch
    ):
        with span("forward"):
            losses = _losses(kernel, active, [len(each) for each in chosen], batch)
            objectives = [
                loss
                if (penalty := member.work.step.penalty) is None
                else loss + penalty(member.live.seen())
                for member, loss in zip(active, losses, strict=True)
            ]
        with span("backward"):
            (torch.stack(objectives).sum() * share).backward()
    for member, value in zip(active, torch.stack(losses).tolist(), strict=True):
        member.total += value * share


def _losses(
    kernel: Kernel, active: Sequence[Member], rows: Sequence[int], batch: Batch
) -> list[Tensor]:
    """Each member's own task loss."""
    parts = [
        dict(zip(batch, each, strict=True))
        for each in zip(*(v.split(list(rows)) for v in batch.values()), strict=True)
    ]
    if kernel.language is not None:
        counts = [int(cast(Generate, kernel.task).positions(part).sum()) for part in parts]
        return [
            kernel.task.loss(logits, part)
            for logits, part in zip(kernel.asked_logits(batch).split(counts), parts, strict=True)
        ]
    pooled = kernel._features(batch).split(list(rows))
    return [
        kernel.task.loss(kernel.task.head_logits(states, member.live.head), part)
        for member, states, part in zip(active, pooled, parts, strict=True)
    ]


def cohort_size(job: Job, base: Base, setting: Setting, clients: int, lanes: int = 1) -> int:
    """``train.cohort = "auto"``: for the base's shape, the job's batch, and ``train.memory``; of
    each lane.
    """
    config = base.model.config
    layers = int(getattr(config, "num_hidden_layers", len(base.layers)))
    heads = getattr(config, "num_attention_heads", 1)
    if not row_by_row(base):
        return 1
    longest = _patches(config) or max(task_of(job.data).tokens.values(), default=1)
    # kept for the backward pass at each layer: about 16 vectors of the hidden size, and scores and
    # weights of attention
    token = layers * (16 * base.hidden + 2 * heads * longest) * base.dtype.itemsize
    if base.head == "lm":  # logits, their softmax and its gradient, in float32
        token += 3 * 4 * int(config.vocab_size)
    site = sum(site.in_features + site.out_features for site in base.sites.values())
    return size_for(
        device=base.device.type,
        batch_size=job.train.batch_size,
        clients=max(
            math.ceil(clients / lanes), min(clients, 2)
        ),  # 1 would be read as "one after the other"
        tokens=job.train.batch_size * longest,
        token_bytes=token,
        client_bytes=4 * setting.rank * site * base.adapter_dtype.itemsize,
        # every member's tokens run through every member's factors: no more of them than a quarter
        # of the base
        share=4 * setting.rank * site / (12 * layers * base.hidden**2),
        memory=memory_for(job.train.memory, base.device) // lanes,
        lanes=lanes,
    )


def row_by_row(base: Base) -> bool:
    """Whether an example stays a row of its batch: the windows of models with stages (Swin) do
    not.
    """
    return isinstance(getattr(base.model.config, "num_attention_heads", 1), int)


def _patches(config: Any) -> int | None:
    """How many tokens an image is to a vision transformer, its class token among them."""
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (side // patch) ** 2 + 1 if isinstance(side, int) and isinstance(patch, int) else None


def memory_for(wanted: str, device: torch.device) -> int:
    """``train.memory`` in bytes; "auto" is half of what is free on the device."""
    if wanted != "auto":
        return int(float(wanted[:-2]) * (10**9 if wanted.endswith("GB") else 10**6))
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return (
            next(int(row.split()[1]) * 1024 for row in rows if row.startswith("MemAvailable")) // 2
        )
    except (OSError, StopIteration, ValueError):
        return 2 * 10**9  # a system that does not say


def size_for(
    *,
    device: str,
    batch_size: int,
    clients: int,
    tokens: int,
    token_bytes: int,
    client_bytes: int,
    share: float,
    memory: int,
    lanes: int = 1,
) -> int:
    """How many clients share a batch: as many as keep the device busy, within ``memory`` bytes.

    ``tokens`` of one client's batch at most, ``token_bytes`` of activations for each,
    ``client_bytes`` for a client's adapter with gradients and optimiser state, ``share`` what it
    takes of the products that all members' factors may cost. A CPU is busy with about 128 examples
    in all its lanes, of at most 16 clients in each; a GPU with about 256.
    """
    busy = 256 if device == "cuda" else 128
    fits = memory // max(1, tokens * token_bytes + client_bytes)
    most = clients if device == "cuda" else min(clients, 16)
    return max(1, min(math.ceil(busy / lanes / batch_size), most, fits, int(1 / share)))
