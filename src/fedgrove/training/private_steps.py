"""The kernel's optimiser steps under example-level privacy (``privacy.example_dp``): one example's
gradient at a time.

A batch of one has no padding and no other example in it, so its gradient is that example's whatever
the base model and the task do. A penalty reads no data and is added after the noise;
``train.clip``, momentum and AdamW then act on the noisy gradient, which costs no privacy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedgrove.federation.tasks.base import Example
from fedgrove.methods.contract import Live, Step, Trained
from fedgrove.privacy.example_dp import ExampleGuard
from fedgrove.training.live import LiveAssembly

if TYPE_CHECKING:
    from fedgrove.training.kernel import Clock, Kernel


def private_steps(
    kernel: Kernel,
    step: Step,
    live: LiveAssembly,
    examples: Sequence[Example],
    clock: Clock,
    guard: ExampleGuard,
) -> Trained:
    """As ``Kernel``'s own steps, of ``batch_size · accumulation`` examples in the mean."""
    options = kernel.options
    count = kernel.steps(step, len(examples))
    expected = min(len(examples), options.batch_size * options.accumulation)
    rate = expected / len(examples)
    optimizer = kernel._optimizer(live)
    rates = [group["lr"] for group in optimizer.param_groups]
    leaves = live.leaves
    losses: list[float] = []

    def gradients(chosen: Sequence[int]) -> Iterator[Sequence[Tensor | None]]:
        for index in chosen:
            batch = kernel._batch([examples[index]])
            with kernel._running(batch, live):
                loss = kernel.task.loss(kernel._logits(live, batch), batch)
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
            losses.append(loss.item())
            yield found

    for index in range(count):
        progress = clock.start + (clock.end - clock.start) * index / count
        for group, rate_of in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate_of * kernel._factor(progress)
        purpose = (*clock.keys, step.stream, index)
        found = guard.step(
            gradients(guard.draw(len(examples), rate, *purpose)), leaves, expected, *purpose
        )
        for leaf, gradient in zip(leaves, found, strict=True):
            leaf.grad = gradient
        if step.penalty is not None:
            seen = Live({term.term.name: term.adapter for term in live.terms}, live.extras)
            added = torch.autograd.grad(step.penalty(seen), leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, added, strict=True):
                if gradient is not None and leaf.grad is not None:
                    leaf.grad += gradient
        if options.clip > 0:
            nn.utils.clip_grad_norm_(leaves, options.clip)
        optimizer.step()
    guard.count(rate, count)
    return Trained(live.trained(), sum(losses) / len(losses) if losses else 0.0, count)
