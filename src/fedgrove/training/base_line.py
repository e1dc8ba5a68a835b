"""``metric_base``: the untouched base with a head trained alone, under the whole run's local
budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra
from fedgrove.federation.tasks.base import Example
from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import Step
from fedgrove.methods.head import PREFIX
from fedgrove.training.kernel import Clock, Kernel, batch_order


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
    """The task's measures on ``test``. The head gets as many optimiser steps as a client has in
    ``rounds`` rounds.

    With the pooled head the base's features are computed once, so this costs two forward passes
    over the data.
    """
    if kernel.base.head == "lm":  # there is no head to train
        return kernel.evaluate(Assembly(), test)
    steps = kernel.steps(Step(Assembly()), len(train)) * rounds
    if kernel.base.head == "stock":
        extras = {PREFIX + name: Extra(value, lr=None) for name, value in initial.items()}
        epochs = steps * kernel.options.batch_size * kernel.options.accumulation / len(train)
        step = Step(Assembly(extras=extras), epochs=epochs, stream="base")
        trained = kernel.train(step, train, Clock(seed, ("base", client)))
        return kernel.evaluate(trained.assembly, test)
    head = _train_head(kernel, initial, train, steps, generator(seed, "base", client, "order"))
    features = kernel.features(test)
    batch = kernel.task.collate(test, kernel.base.pad_id)
    with torch.no_grad():
        return kernel.task.measure(
            kernel.task.score(kernel.task.head_logits(features, head), batch)
        )


def _train_head(
    kernel: Kernel,
    initial: Mapping[str, Tensor],
    train: Sequence[Example],
    steps: int,
    order: torch.Generator,
) -> dict[str, Tensor]:
    options = kernel.options
    features = kernel.features(train).clone()  # out of inference mode
    head = {
        name: value.to(features.dtype).clone().requires_grad_() for name, value in initial.items()
    }
    rate = options.lr if options.head_lr is None else options.head_lr
    # features and head are on the CPU
    optimizer = torch.optim.AdamW(
        head.values(), lr=rate, weight_decay=options.weight_decay, fused=True
    )
    batches = batch_order(len(train), options.batch_size * options.accumulation, order)
    for _ in range(max(1, math.ceil(steps))):
        chosen = next(batches)
        batch = kernel.task.collate([train[i] for i in chosen], kernel.base.pad_id)
        loss = kernel.task.loss(kernel.task.head_logits(features[chosen], head), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in head.items()}
