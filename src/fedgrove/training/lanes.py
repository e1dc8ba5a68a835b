"""Lanes: a CPU's cores each run a batch of their own, where one batch at a time would have them
share each product.

Small products do not fill several cores, and all wait for the slowest at the end of each. A lane is
a kernel on module objects of its own around the base's own tensors, so the weights are in memory
once however many lanes there are, and what one lane's hooks add or fold does not touch another's. A
GPU is one lane: it runs large batches instead.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.profile import lane_spans

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Task
    from fedgrove.interop.models import Base
    from fedgrove.job import Job
    from fedgrove.job.sections import TrainSection
    from fedgrove.methods.contract import Trained

Item = TypeVar("Item")
Found = TypeVar("Found")
LANES = 2  # measured on two cores (docs/performance.md)


def lane_count(job: Job) -> int:
    """How many lanes a job with its machine choices made gets; one where clients are to train one
    by one.
    """
    train = job.train
    # dropout draws from one source
    several = train.device == "cpu" and train.cohort != 1 and not job.lora.dropout
    if several:
        return min(LANES, int(train.threads))
    return 1


class Lanes:
    """Kernels that work at the same time, each in a thread with an equal share of the process's
    ``threads``.
    """

    def __init__(self, kernels: Sequence[Kernel], threads: int = 1):
        self.kernels = list(kernels)
        self.threads = threads

    @classmethod
    def on(
        cls,
        base: Base,
        task: Task,
        options: TrainSection,
        *,
        dropout: float = 0.0,
        count: int,
        threads: int,
    ) -> Lanes:
        """``count`` lanes on one base."""
        bases = [base, *(twin(base) for _ in range(count - 1))]  # before hooks are on it
        kernels = [Kernel(each, task, options, dropout=dropout) for each in bases]
        return cls(kernels, threads)

    def train(self, works: Sequence[Work]) -> list[Trained]:
        """What ``Kernel.work`` gives for each; those that can share a batch, one in each lane."""
        parts = self._parts(works)

        def train(kernel: Kernel, part: list[int]) -> list[Trained]:
            return kernel.train_together([works[index] for index in part])

        done: dict[int, Trained] = {}
        for part, found in zip(parts, self.map(train, parts), strict=True):
            done.update(zip(part, found, strict=True))
        return [done[index] for index in range(len(works))]

    def _parts(self, works: Sequence[Work]) -> list[list[int]]:
        """The works that share a batch, one such part for each lane, and the others one by one."""
        count = len(self.kernels)
        kernel = self.kernels[0]
        joined = []
        alone = []
        for index, work in enumerate(works):
            if kernel.joins(work):
                joined.append(index)
            else:
                alone.append(index)
        # dealt in turn: neighbours are often of one group, with texts of one length
        dealt = [joined[lane::count] for lane in range(count)]
        parts = [part for part in dealt if part]
        return parts + [[index] for index in alone]

    def map(
        self,
        work: Callable[[Kernel, Item], Found],
        items: Iterable[Item],
    ) -> Iterator[Found]:
        """``work`` of each item in the given order, on whichever lane is free; items are drawn as
        they are needed.

        Whoever stops listening, by Ctrl-C for instance, waits for the batches that have begun.
        """
        rest = iter(items)
        first = list(islice(rest, len(self.kernels)))
        if len(first) < 2:  # nothing to do beside it: on all threads
            yield from (work(self.kernels[0], item) for item in chain(first, rest))
            return
        free: SimpleQueue[Kernel] = SimpleQueue()
        for kernel in self.kernels:
            free.put(kernel)
        spans = lane_spans(len(self.kernels))

        def run(item: Item) -> Found:
            kernel = free.get()
            try:
                with spans():
                    return work(kernel, item)
            finally:
                free.put(kernel)

        lanes = len(self.kernels)
        share = max(1, self.threads // lanes)
        # here too: what makes the next item must not depend on who is at work beside it
        torch.set_num_threads(share)
        pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(share,))
        waiting: deque[Future[Found]] = deque()
        try:
            for item in chain(first, rest):
                waiting.append(pool.submit(run, item))
                if len(waiting) > len(self.kernels):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            self._halt(True)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._halt(False)
            torch.set_num_threads(self.threads)

    def _halt(self, halted: bool) -> None:
        for kernel in self.kernels:
            if halted:
                kernel.halt.set()
            else:
                kernel.halt.clear()


def twin(base: Base) -> Base:
    """The base with module objects of its own around the same tensors."""
    model = base.model
    known: dict[int, object] = {}  # what deepcopy takes as copied already
    for parameter in model.parameters():
        known[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    for buffer in model.buffers():
        known[id(buffer)] = buffer
    return replace(base, model=copy.deepcopy(model, known))
