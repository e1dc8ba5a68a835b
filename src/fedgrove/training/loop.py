"""The one training loop. A client alone is a cohort of one.

Each round of it (``fit``) makes one optimiser step of every member that has steps left: the rates
are set; the source of gradients draws each member's examples, runs them, and leaves each leaf's
gradient (``OfBatches`` the plain one, ``PerExample`` the clipped and noisy one of DP-SGD); each
member's gradient is clipped; the optimiser moves (or, as ``SquaredGradients``, only measures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedgrove.ground.plain import Plain
from fedgrove.ground.seeds import generator
from fedgrove.training.live import LiveAssembly
from fedgrove.training.profile import span

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Example
    from fedgrove.job.sections import TrainSection
    from fedgrove.methods.contract import Step
    from fedgrove.privacy.example_dp import ExampleGuard

#: A parameter group of an optimiser: leaves, their learning rate, its peak, and their stretch.
Group = Plain

#: A pass over some members' examples: inside, each member's task loss on its own.
Losses = Callable[
    [Sequence[LiveAssembly], Sequence[Sequence["Example"]]],
    AbstractContextManager[list[Tensor]],
]


@dataclass(frozen=True)
class Clock:
    """Where in the whole run a step of local work stands, for the learning-rate schedule."""

    seed: int
    keys: tuple[object, ...]  # (round, client)
    start: float = 0.0  # share of the run that is done before the round
    end: float = 1.0


@dataclass(frozen=True)
class Stretch:
    """``count`` optimiser steps, and the share of the whole run that they cover."""

    count: int
    start: float
    end: float

    def progress(self, index: int) -> float:
        """The share of the run that is done before step ``index``."""
        share = self.end - self.start
        return self.start + share * index / self.count


@dataclass(eq=False)
class Member:
    """One client while it trains."""

    live: LiveAssembly
    step: Step
    examples: Sequence[Example]
    batches: Iterator[list[int]]  # of indices into the examples, without end
    stretch: Stretch
    total: float = 0.0  # of the task's losses, and what it is a sum over
    seen: int = 0

    @property
    def loss(self) -> float:
        return self.total / max(1, self.seen)

    def draw(self) -> list[Example]:
        """The next batch."""
        indices = next(self.batches)
        return [self.examples[index] for index in indices]

    def objective(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What is minimised: the task's loss and the step's penalty."""
        if self.step.penalty is None:
            return loss
        penalty = self.step.penalty(self.live.seen())
        return loss + penalty


class Gradients(Protocol):
    """A source of gradients."""

    def __call__(self, members: Sequence[Member], index: int) -> None:
        """Leave the gradients of each member's step ``index`` in its leaves, which have none yet,
        and add up its loss.
        """


def fit(
    members: Sequence[Member],
    gradients: Gradients,
    optimizer: torch.optim.Optimizer | SquaredGradients,
    options: TrainSection,
) -> None:
    """Make every member's steps. The optimiser is one for all of them (``optimizer_of``)."""
    most = max(member.stretch.count for member in members)
    for index in range(most):
        active = [member for member in members if index < member.stretch.count]
        set_rates(optimizer.param_groups, index, options)
        optimizer.zero_grad(set_to_none=True)  # who is done has no gradients, and does not move
        gradients(active, index)
        with span("optimiser"):
            if options.clip > 0:
                for member in active:
                    nn.utils.clip_grad_norm_(member.live.leaves, options.clip)
            optimizer.step()


# ------------------------------------------------------------------ sources of gradients
class OfBatches:
    """The gradient of each member's own mean loss over ``accumulation`` batches."""

    def __init__(self, losses: Losses, accumulation: int):
        self.losses = losses
        self.accumulation = accumulation

    def __call__(self, members: Sequence[Member], index: int) -> None:
        """As in Gradients."""
        share = 1 / self.accumulation
        lives = [member.live for member in members]
        for _ in range(self.accumulation):
            batches = [member.draw() for member in members]
            with self.losses(lives, batches) as losses:
                pairs = zip(members, losses, strict=True)
                objectives = [member.objective(loss) for member, loss in pairs]
                with span("backward"):
                    whole = torch.stack(objectives).sum() * share
                    whole.backward()
            numbers: list[float] = torch.stack(losses).tolist()
            for member, number in zip(members, numbers, strict=True):
                member.total += number * share
        for member in members:
            member.seen += 1


class PerExample:
    """The noisy mean of one member's clipped gradients, an example each (``privacy.example_dp``).

    A step draws every example by a coin, ``expected`` of them in the mean. An example is to the
    member's leaves what a member is to the base: with ``copies`` (``LiveAssembly.copy``) so many
    examples run in one pass as a cohort, each on leaves of its own, whose gradients are then that
    example's whatever stands beside it; without, each runs alone. (Measured, eight examples: half
    the time of one at a time on MiniLM in bfloat16, where ``torch.func.vmap`` takes nine tenths.)

    A penalty reads no data and is added after the noise; ``train.clip``, momentum and AdamW then
    act on the noisy gradient, which costs no privacy.
    """

    def __init__(
        self,
        losses: Losses,
        guard: ExampleGuard,
        expected: int,
        purpose: Sequence[object],
        copies: Sequence[LiveAssembly] = (),
    ):
        self.losses = losses
        self.guard = guard
        self.expected = expected
        self.purpose = tuple(purpose)
        self.copies = copies

    def __call__(self, members: Sequence[Member], index: int) -> None:
        """As in Gradients."""
        (member,) = members
        leaves = member.live.leaves
        examples = len(member.examples)
        rate = self.expected / examples
        purpose = (*self.purpose, index)
        drawn = self.guard.draw(examples, rate, *purpose)
        each = self._each(member, drawn)
        found = self.guard.step(each, leaves, self.expected, *purpose)
        self.guard.count(rate, 1)
        for leaf, gradient in zip(leaves, found, strict=True):
            leaf.grad = gradient
        if member.step.penalty is not None:
            penalty = member.step.penalty(member.live.seen())
            penalty.backward()

    def _each(self, member: Member, drawn: Sequence[int]) -> Iterator[Sequence[Tensor | None]]:
        """Each drawn example's gradient of every leaf, [as the leaf], None where it does not reach
        it.
        """
        lives = self.copies or [member.live]
        for start in range(0, len(drawn), len(lives)):
            chosen = drawn[start : start + len(lives)]
            examples = [[member.examples[place]] for place in chosen]
            running = lives[: len(chosen)]
            leaves: list[Tensor] = []
            for live in running:
                leaves.extend(live.leaves)
            with self.losses(running, examples) as losses, span("backward"):
                whole = torch.stack(losses)
                found = torch.autograd.grad(whole.sum(), leaves, allow_unused=True)
            member.total += math.fsum(whole.tolist())
            member.seen += len(chosen)
            each = len(member.live.leaves)
            for first in range(0, len(found), each):
                yield found[first : first + each]


# ------------------------------------------------------------------------------ optimisers
def optimizer_of(
    members: Sequence[Member],
    options: TrainSection,
    device: torch.device,
) -> torch.optim.Optimizer:
    """A fresh optimiser over all members' leaves; those of one rate and stretch are one group."""
    together: dict[tuple[float | None, Stretch], list[Tensor]] = {}
    for member in members:
        for multiplier, leaves in member.live.groups.items():
            alike = together.setdefault((multiplier, member.stretch), [])
            alike.extend(leaves)
    groups: list[Group] = []
    for (multiplier, stretch), leaves in together.items():
        peak = _peak(multiplier, options)
        group = {
            "params": leaves,
            "lr": peak,
            "peak": peak,
            "stretch": stretch,
        }
        groups.append(group)
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
    return torch.optim.AdamW(
        groups,
        lr=options.lr,
        weight_decay=options.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def _peak(multiplier: float | None, options: TrainSection) -> float:
    """The learning rate before the schedule; of the multiplier None the head's own."""
    if multiplier is not None:
        return options.lr * multiplier
    if options.head_lr is not None:
        return options.head_lr
    return options.lr


class SquaredGradients:
    """Stands where an optimiser stands, and moves nothing: each leaf's squared gradient, its mean
    over ``count`` steps (the diagonal of the empirical Fisher information, by batches).
    """

    def __init__(
        self,
        leaves: Sequence[Float[Tensor, "*any"]],
        count: int,
    ):
        self.count = count
        self.squares = {leaf: torch.zeros_like(leaf) for leaf in leaves}
        self.param_groups: list[Group] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last step's gradients."""
        for leaf in self.squares:
            leaf.grad = None

    def step(self) -> None:
        """Look at the gradients that are there."""
        for leaf, square in self.squares.items():
            if leaf.grad is not None:
                square += leaf.grad**2 / self.count


# -------------------------------------------------------------------------------- schedule
def set_rates(groups: Sequence[Group], index: int, options: TrainSection) -> None:
    """Each group's learning rate at its step ``index``."""
    for group in groups:
        stretch: Stretch = group["stretch"]
        progress = stretch.progress(index)
        now = factor(progress, options.schedule, options.warmup_fraction)
        group["lr"] = group["peak"] * now


def factor(progress: float, schedule: str, warmup: float) -> float:
    """The schedule's factor at a share of the whole run: warm-up, then constant, linear or cosine
    to zero.

    Not ``transformers.get_scheduler``: that counts whole steps of one optimiser, and here a client
    has an optimiser of its own in each round it takes part in, a share of the run covers as many
    steps as the client's data give, and the groups of a cohort stand at different shares. For one
    client and one round both are the same (tests/training/test_loop.py).
    """
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    rest = (progress - warmup) / max(1e-12, 1 - warmup)
    if schedule == "linear":
        return max(0.0, 1 - rest)
    if schedule == "cosine":
        angle = math.pi * min(1.0, rest)
        return 0.5 * (1 + math.cos(angle))
    return 1.0


# ------------------------------------------------------------------------------------ data
def steps_of(options: TrainSection, step: Step, examples: int) -> int:
    """How many optimiser steps a step of local work makes on so many examples."""
    batches = math.ceil(examples / options.batch_size)
    per_epoch = batches / options.accumulation
    if step.epochs is not None:
        count = math.ceil(step.epochs * per_epoch)
    elif options.local_epochs is not None:
        count = math.ceil(options.local_epochs * per_epoch * step.share)
    else:
        steps = options.local_steps or 1
        count = round(steps * step.share)
    return max(1, count)


def batch_order(examples: int, size: int, rng: torch.Generator) -> Iterator[list[int]]:
    """Batches of indices without end: a new permutation for each pass, the last batch of a pass may
    be short.
    """
    while True:
        order = torch.randperm(examples, generator=rng).tolist()
        for start in range(0, examples, size):
            yield order[start : start + size]


def parted(
    examples: Sequence[Example], part: tuple[float, float], clock: Clock
) -> Sequence[Example]:
    """A stretch of the client's examples in an order of its own, the same in all rounds; at least
    one where there is any.
    """
    first, last = (round(share * len(examples)) for share in part)
    if (first, last) == (0, len(examples)):
        return examples
    rng = generator(clock.seed, clock.keys[-1], "parts")
    order = torch.randperm(len(examples), generator=rng).tolist()
    chosen = order[first:last] or order[:1]
    return [examples[index] for index in sorted(chosen)]


def some(examples: Sequence[Example], step: Step, clock: Clock) -> Sequence[Example]:
    """The step's ``count`` examples of its ``part``, a seeded draw in the given order (rows may be
    sorted by label); 0: all.
    """
    examples = parted(examples, step.part, clock)
    if not step.count:
        return examples
    rng = generator(clock.seed, *clock.keys, step.stream, "examples")
    order = torch.randperm(len(examples), generator=rng)
    drawn = sorted(order[: step.count].tolist())
    return [examples[index] for index in drawn]
