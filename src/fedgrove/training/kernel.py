"""The kernel: trains, evaluates and asks assemblies on one resident frozen base.

It joins what the other files of this room know: the base and its hooks (``hooked``), how
predictions are read for the task (``readers``), and the training loop (``loop``).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.assembly import Assembly, trained_parameters
from fedgrove.ground.errors import JobError
from fedgrove.ground.seeds import derive, generator
from fedgrove.methods.contract import Step, Trained
from fedgrove.training.cohort import Cohort
from fedgrove.training.frozen import FrozenLayers
from fedgrove.training.hooked import HookedBase
from fedgrove.training.live import LiveAssembly, Running
from fedgrove.training.loop import (
    Clock,
    Gradients,
    Member,
    OfBatches,
    PerExample,
    SquaredGradients,
    Stretch,
    batch_order,
    fit,
    optimizer_of,
    parted,
    some,
    steps_of,
)
from fedgrove.training.profile import span
from fedgrove.training.readers import READERS, Collate, Found, Writer, reader_of

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Batch, Example, Task
    from fedgrove.interop.models import Base
    from fedgrove.job.sections import TrainSection
    from fedgrove.privacy.example_dp import ExampleGuard

_EVAL_BATCH = 64  # where train.eval_batch_size is left to the machine and nobody chose


@dataclass(frozen=True, eq=False)
class Work:
    """One client's step of local work. With a ``guard`` each example's gradient is clipped and
    noise added (``[privacy] example_clip``).
    """

    step: Step
    examples: Sequence[Example]
    clock: Clock
    guard: ExampleGuard | None = None


class Halted(Exception):
    """Work was given up between two batches."""


class Kernel:
    """Trains and evaluates assemblies on one base. Not reentrant: one call at a time.

    ``options`` is the job's ``[train]``; ``dropout`` its ``lora.dropout``.
    """

    def __init__(self, base: Base, task: Task, options: TrainSection, *, dropout: float = 0.0):
        self.base = base
        self.task = task
        self.options = options
        self.dropout = dropout
        #: set from another thread: work ends before its next batch
        self.halt = threading.Event()
        self.hooked = HookedBase(base, packs=READERS[base.head].packs)
        self.reader = reader_of(self.hooked, task)
        self.layers = FrozenLayers(base)

    def close(self) -> None:
        """Take the hooks off the base."""
        self.hooked.close()
        self.reader.close()

    # ---------------------------------------------------------------- training
    def train(
        self,
        step: Step,
        examples: Sequence[Example],
        clock: Clock,
        guard: ExampleGuard | None = None,
    ) -> Trained:
        """Run one step on one client's examples and give back the trained assembly."""
        return self.work(Work(step, examples, clock, guard))

    def work(self, work: Work) -> Trained:
        """One client's work, alone."""
        step = work.step
        self._prime(work.examples)
        if work.guard is not None and step.measure != "train":
            raise JobError(
                f'A step that measures "{step.measure}" reads examples without noise, so '
                f"privacy.example_clip cannot "
                "hold; leave it out with this method."
            )
        if step.measure == "features":
            chosen = some(work.examples, step, work.clock)
            features = self.features(chosen, step.assembly)
            return Trained(step.assembly, math.nan, 0, features=features)
        if step.measure == "loss":
            return Trained(step.assembly, self._loss(work), 0)
        if trained_parameters(step.assembly) == 0:
            return Trained(step.assembly, math.nan, 0)
        if step.measure == "fisher":
            return self._fisher(work)
        if self.dropout:
            seed = derive(work.clock.seed, *_keys(work), "dropout")
            torch.manual_seed(seed)
        (trained,) = self._optimise([work])
        return trained

    def joins(self, work: Work) -> bool:
        """Whether a client's work can share its batches with other clients'.

        What does not fit runs alone: measuring steps, noise by example, dropout (its draws would
        differ), folded updates and left-out layers (they change the base for everyone), weights
        that depend on the input, a head inside the model, a base that mixes a batch's rows.
        """
        return (
            work.guard is None
            and work.step.measure == "train"
            and trained_parameters(work.step.assembly) > 0
            and self._shares(work.step.assembly)
        )

    def _shares(self, assembly: Assembly) -> bool:
        """Whether an assembly can run on a part of a batch."""
        return (
            self.reader.joins
            and self.hooked.joins
            and not self.dropout
            and not assembly.folded
            and assembly.layers is None
            and assembly.mix.linear
        )

    def train_together(self, works: Sequence[Work]) -> list[Trained]:
        """What ``work`` gives for each, up to rounding. Several must all be such as ``joins``."""
        if len(works) == 1:
            return [self.work(works[0])]
        for work in works:
            self._prime(work.examples)
        return self._optimise(works)

    def steps(self, step: Step, examples: int) -> int:
        """How many optimiser steps a step of local work makes on so many examples."""
        return steps_of(self.options, step, examples)

    def _optimise(self, works: Sequence[Work]) -> list[Trained]:
        options = self.options
        with ExitStack() as stack:
            members = []
            for work in works:
                opened = self.opened(work.step.assembly, train=True)
                live = stack.enter_context(opened)
                chosen = some(work.examples, work.step, work.clock)
                count = self.steps(work.step, len(chosen))
                member = self._member(work, live, chosen, count)
                members.append(member)
            gradients = self._gradients(members, works[0])
            optimizer = optimizer_of(members, options, self.base.device)
            fit(members, gradients, optimizer, options)
            found = []
            for member in members:
                assembly = member.live.trained()
                found.append(Trained(assembly, member.loss, member.stretch.count))
            return found

    def _gradients(self, members: Sequence[Member], work: Work) -> Gradients:
        """The source of gradients; under a guard of the one member, whose work this is."""
        size = self.options.batch_size
        accumulation = self.options.accumulation
        if work.guard is None:
            losses = partial(self.losses, together=len(members) > 1)
            return OfBatches(losses, accumulation)
        (member,) = members
        expected = min(len(member.examples), size * accumulation)
        copies: list[LiveAssembly] = []
        # that no row of a batch touches another was tried on this model: see packed.packs
        if self.hooked.packs and self._shares(work.step.assembly):
            copies = [member.live.copy() for _ in range(size)]
        losses = partial(self.losses, together=bool(copies))
        return PerExample(losses, work.guard, expected, _keys(work), copies)

    @torch.no_grad()
    def _loss(self, work: Work) -> float:
        """The mean of the task's loss over the step's examples."""
        chosen = some(work.examples, work.step, work.clock)
        size = self.options.batch_size
        total = 0.0
        with self.opened(work.step.assembly, train=False) as live:
            for start in range(0, len(chosen), size):
                batch = chosen[start : start + size]
                with self.losses([live], [batch]) as losses:
                    total += float(losses[0]) * len(batch)
        return total / len(chosen)

    def _fisher(self, work: Work) -> Trained:
        """Mean squared gradient of each trained factor over batches; nothing is updated."""
        step = work.step
        options = self.options.model_copy(update={"clip": 0.0})
        chosen = parted(work.examples, step.part, work.clock)
        with self.opened(step.assembly, train=True) as live:
            batches = math.ceil(len(chosen) / options.batch_size)
            count = step.count or batches
            member = self._member(work, live, chosen, count)
            measured = SquaredGradients(live.leaves, count)
            gradients = OfBatches(self.losses, accumulation=1)
            fit([member], gradients, measured, options)

        def score(leaf: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
            if leaf in measured.squares:
                return measured.squares[leaf].cpu()
            return torch.zeros(leaf.shape)

        scores: dict[str, Adapter] = {}
        for term in live.terms:
            found: Adapter = {}
            for site, factors in term.adapter.items():
                found[site] = Factors(score(factors.A), score(factors.B), factors.scale)
            scores[term.name] = found
        return Trained(step.assembly, member.loss, 0, scores=scores)

    def _member(
        self,
        work: Work,
        live: LiveAssembly,
        examples: Sequence[Example],
        count: int,
    ) -> Member:
        """The client of this work, who makes ``count`` steps on these examples."""
        clock = work.clock
        order = generator(clock.seed, *_keys(work), "order")
        return Member(
            live=live,
            step=work.step,
            examples=examples,
            batches=batch_order(len(examples), self.options.batch_size, order),
            stretch=Stretch(count, clock.start, clock.end),
        )

    @contextmanager
    def losses(
        self,
        lives: Sequence[LiveAssembly],
        examples: Sequence[Sequence[Example]],
        *,
        together: bool = False,
    ) -> Iterator[list[Float[Tensor, ""]]]:
        """Each client's task loss on its own examples, all in one pass over the base; inside,
        gradients can be asked for. ``together``: as a cohort, also where one is left of it.
        """
        rows = [self.task.rows_each * len(own) for own in examples]
        everyones = list(chain.from_iterable(examples))
        batch = self._batch(everyones)
        if together:
            running: Running = Cohort(lives, rows)
        else:
            running = lives[0]
        with self.hooked.running(batch, running):
            with span("forward"):
                self._prepare(lives, batch)
                found = self._losses(lives, rows, batch)
            yield found

    def _losses(
        self, lives: Sequence[LiveAssembly], rows: Sequence[int], batch: Batch
    ) -> list[Float[Tensor, ""]]:
        """Each client's loss on its rows of the running batch."""
        if lives[0].heads:  # alone in the batch: its mix depends on the input
            return [self.task.loss(self.reader.answer(lives[0], batch), batch)]
        heads = [live.head for live in lives]
        return self.reader.losses(heads, rows, batch)

    # -------------------------------------------------------------- evaluation
    @torch.inference_mode()
    def evaluate(
        self,
        assembly: Assembly,
        examples: Sequence[Example],
        found: Found | None = None,
    ) -> dict[str, float]:
        """The task's measures of an assembly on some examples; ``found`` takes what was answered.

        Of a language model some are those of texts that it writes here.
        """
        self._prime(examples)
        with self.opened(assembly, train=False) as live:
            sums = self.reader.evaluate(live, examples, self.passes, found)
        return self.task.measure(sums)

    @property
    def writes(self) -> bool:
        """Whether the model writes texts."""
        return isinstance(self.reader, Writer)

    def chosen(self, examples: Sequence[Example]) -> list[int]:
        """Which examples of an evaluation get a text written; all where the model writes none."""
        if not isinstance(self.reader, Writer):
            return list(range(len(examples)))
        return self.reader.task.chosen(examples)

    @torch.inference_mode()
    def generate(
        self,
        assembly: Assembly,
        examples: Sequence[Example],
        most: int | None = None,
    ) -> list[str]:
        """What a language model writes after each prompt, greedily, in the given order; ``most``
        new tokens.
        """
        if not isinstance(self.reader, Writer):
            raise JobError(f"data.task = {self.task.name!r} writes no texts.")
        with self.opened(assembly, train=False) as live:
            return self.reader.write(live, examples, self.passes, most)

    @torch.no_grad()
    def each_loss(self, assembly: Assembly, examples: Sequence[Example]) -> Iterator[float]:
        """The task's loss on each example by itself."""
        self._prime(examples)
        with self.opened(assembly, train=False) as live:
            for example in examples:
                with self.losses([live], [[example]]) as losses:
                    loss = float(losses[0])
                yield loss

    def each_gradient(
        self,
        assembly: Assembly,
        examples: Sequence[Example],
    ) -> Iterator[Float[Tensor, " n"]]:
        """The gradient of the task's loss on each example by itself, of all that trains side by side
        (leaf after leaf), on the CPU.
        """
        self._prime(examples)
        with self.opened(assembly, train=True) as live:
            leaves = live.leaves
            for example in examples:
                with self.losses([live], [[example]]) as losses:
                    found = torch.autograd.grad(
                        losses[0],
                        leaves,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                yield torch.cat([each.flatten().cpu() for each in found])

    @torch.inference_mode()
    def logits(
        self, assembly: Assembly, examples: Sequence[Example]
    ) -> Float[Tensor, "examples *t classes"]:
        """Logits in the given order, on the CPU; of a task that compares, its answers by example."""
        self._prime(examples)
        return self._answers(assembly, examples)

    def _answers(
        self, assembly: Assembly, examples: Sequence[Example]
    ) -> Float[Tensor, "examples *t classes"]:
        rows: dict[int, Tensor] = {}
        with self.opened(assembly, train=False) as live:
            for indices, batch in self.passes(live, examples):
                logits = self.reader.answer(live, batch)
                answers = self.task.by_example(logits, batch)
                rows.update(zip(indices, answers.cpu(), strict=True))
        return in_order(rows)

    @torch.inference_mode()
    def _prime(self, examples: Sequence[Example]) -> None:
        """Have the task note on the examples what it asks of the untouched base."""
        self.task.prime(partial(self._answers, Assembly()), examples)

    @torch.inference_mode()
    def features(
        self,
        examples: Sequence[Example],
        assembly: Assembly | None = None,
    ) -> Float[Tensor, "examples h"]:
        """Pooled features of the base (of the untouched one without an assembly), in the given
        order, on the CPU.
        """
        rows: dict[int, Tensor] = {}
        with self.opened(assembly or Assembly(), train=False) as live:
            for indices, batch in self.passes(live, examples):
                pooled = _of_examples(self.reader.features(batch), len(indices))
                rows.update(zip(indices, pooled.cpu(), strict=True))
        return in_order(rows)

    def passes(
        self,
        live: LiveAssembly,
        examples: Sequence[Example],
        collate: Collate | None = None,
    ) -> Iterator[tuple[list[int], Batch]]:
        """As in ``readers.Passes``."""

        def length(index: int) -> tuple[int, int]:
            return self.task.length(examples[index]), index

        order = sorted(range(len(examples)), key=length)
        size = self.options.eval_batch_size
        if size == "auto":
            size = _EVAL_BATCH
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            chosen = [examples[index] for index in indices]
            batch = self._batch(chosen, collate)
            with self.hooked.running(batch, live):
                self._prepare([live], batch)
                yield indices, batch

    # ------------------------------------------------------------------ pieces
    @contextmanager
    def opened(self, assembly: Assembly, *, train: bool) -> Iterator[LiveAssembly]:
        """The assembly live on the base; afterwards the base is as it was, whatever happened."""
        live = LiveAssembly(
            assembly,
            device=self.base.device,
            dtype=self.base.adapter_dtype,
            train=train,
            dropout=self.dropout,
            frozen=self.layers.at,
        )
        with self.hooked.changed(assembly):
            yield live

    def _batch(self, examples: Sequence[Example], collate: Collate | None = None) -> Batch:
        """The examples as one batch on the device."""
        if self.halt.is_set():
            raise Halted
        collate = collate or self.task.collate
        device = self.base.device
        with span("batches"):
            batch = collate(examples, self.base.pad_id)
            return {key: value.to(device) for key, value in batch.items()}

    def _prepare(self, lives: Sequence[LiveAssembly], batch: Batch) -> None:
        """Give a live assembly whose mix reads them the running batch's features, and have it
        begin.
        """
        mask = batch.get("attention_mask")
        if mask is not None:
            mask = mask.bool()
        examples = len(next(iter(batch.values())))
        for live in lives:
            mix = live.assembly.mix
            if mix.needs_features:
                added = live.part(mix.features_with)
                with self.hooked.instead(added), torch.no_grad():
                    live.features = self.reader.features(batch)
            live.begin(examples, mask)


def _of_examples(rows: Float[Tensor, "rows h"], count: int) -> Float[Tensor, "count h"]:
    """A row for each of so many examples: the mean of its rows."""
    if len(rows) == count:
        return rows
    return rows.unflatten(0, (count, -1)).mean(1)


def in_order(rows: Mapping[int, Tensor]) -> Tensor:
    """Rows [...] by their numbers, 0 and on -> [rows, ...]; of tokens, whose number differs, with
    zeros after the last.
    """
    return pad_sequence([rows[index] for index in range(len(rows))], batch_first=True)


def _keys(work: Work) -> tuple[object, ...]:
    """What the randomness of a client's work comes from, beside the seed."""
    return (*work.clock.keys, work.step.stream)
