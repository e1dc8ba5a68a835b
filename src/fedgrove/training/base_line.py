"""``metric_base``: the untouched base with a head trained alone, under the whole run's local
budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra
from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import Step
from fedgrove.methods.head import PREFIX
from fedgrove.training.kernel import Kernel
from fedgrove.training.live import LiveAssembly
from fedgrove.training.loop import (
    Clock,
    Member,
    OfBatches,
    Stretch,
    batch_order,
    fit,
    optimizer_of,
)

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Example, HeadedTask

_FEATURES = "features"  # an example's, beside what its task put into it


def base_measure(
    kernel: Kernel,
    initial: Mapping[str, Tensor],
    train: Sequence[Example],
    test: Sequence[Example],
    *,
    rounds: int,
    client: str,
    seed: int,
) -> dict[str, float]:
    """The task's measures on ``test``. The head, which begins at ``initial`` (its tensors [as the
    task makes them] by name), gets as many optimiser steps as a client has in
    ``rounds`` rounds.

    Where the head sees pooled features alone, the base's are computed once, so this costs two
    forward passes over the data.
    """
    if not kernel.reader.has_head:
        return kernel.evaluate(Assembly(), test)
    steps = kernel.steps(Step(Assembly()), len(train)) * rounds
    head = Assembly(
        extras={PREFIX + name: Extra(value, lr=None) for name, value in initial.items()}
    )
    if kernel.reader.head_sees_features:
        order = generator(seed, "base", client, "order")
        return OnFeatures(kernel).measure(head, train, test, steps, order)
    epochs = steps * kernel.options.batch_size * kernel.options.accumulation / len(train)
    step = Step(head, epochs=epochs, stream="base")
    trained = kernel.train(step, train, Clock(seed, ("base", client)))
    return kernel.evaluate(trained.assembly, test)


class OnFeatures:
    """A head alone on features that are there already; on the CPU, by AdamW at a constant rate."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.task: HeadedTask = kernel.reader.task
        self.pad_id = kernel.base.pad_id

    def measure(
        self,
        head: Assembly,
        train: Sequence[Example],
        test: Sequence[Example],
        steps: int,
        order: torch.Generator,
    ) -> dict[str, float]:
        """The task's measures on ``test`` of the head after so many steps on ``train``."""
        options = self.kernel.options
        size = options.batch_size * options.accumulation
        plain = {
            "optimizer": "adamw",
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "clip": 0.0,
        }
        options = options.model_copy(update=plain)
        device = torch.device("cpu")
        live = LiveAssembly(
            head,
            device=device,
            dtype=self.kernel.base.adapter_dtype,
            train=True,
        )
        member = Member(
            live=live,
            step=Step(head),
            examples=self._with_features(train),
            batches=batch_order(len(train), size, order),
            stretch=Stretch(max(1, math.ceil(steps)), 0.0, 1.0),
        )
        gradients = OfBatches(self.losses, accumulation=1)
        fit([member], gradients, optimizer_of([member], options, device), options)
        with torch.no_grad():
            logits = self.task.head_logits(self.kernel.features(test), live.head)
            batch = self.task.collate(test, self.pad_id)
            return self.task.measure(self.task.score(logits, batch))

    @contextmanager
    def losses(
        self,
        lives: Sequence[LiveAssembly],
        examples: Sequence[Sequence[Example]],
    ) -> Iterator[list[Float[Tensor, ""]]]:
        """As in ``loop.Losses``, of one head."""
        (live,), (own,) = lives, examples
        features = torch.stack([example[_FEATURES] for example in own])
        batch = self.task.collate(own, self.pad_id)
        yield [self.task.loss(self.task.head_logits(features, live.head), batch)]

    def _with_features(self, examples: Sequence[Example]) -> list[Example]:
        features = self.kernel.features(examples).clone()  # out of inference mode
        return [
            {**example, _FEATURES: own} for example, own in zip(examples, features, strict=True)
        ]
