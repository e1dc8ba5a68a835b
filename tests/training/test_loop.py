"""The loop's parts: the schedule, the sources of gradients, and what only measures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import sentences, unclipped
from tests.training.test_kernel import CLOCK, TASK, head, start

from fedgrove.adapters import Assembly, Term
from fedgrove.adapters.private import unseal
from fedgrove.interop.models import Base, load_base
from fedgrove.methods.contract import Step, Trained
from fedgrove.privacy.example_dp import ExampleGuard
from fedgrove.privacy.randomness import of_seed
from fedgrove.training.kernel import Kernel
from fedgrove.training.loop import Stretch, factor, set_rates


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


@pytest.fixture(scope="module")
def examples(base: Base) -> list[dict[str, Any]]:
    return TASK.encode(sentences(13, seed=1), base.processor)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("constant", "constant"), ("linear", "linear"), ("cosine", "cosine")]
)
def test_one_client_in_one_round_has_the_rates_of_transformers(ours: str, theirs: str) -> None:
    from transformers import get_scheduler

    leaf = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([leaf], lr=0.3)
    schedule = get_scheduler(theirs, optimizer, num_warmup_steps=0, num_training_steps=7)
    groups: list[dict[str, Any]] = [{"peak": 0.3, "stretch": Stretch(7, 0.0, 1.0)}]
    for index in range(7):
        set_rates(groups, index, unclipped(schedule=ours))
        assert groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)
        optimizer.step()
        schedule.step()


def test_rates_go_on_from_round_to_round_whatever_the_number_of_steps() -> None:
    whole = Stretch(40, 0.0, 1.0)
    for count in (3, 10):
        third = Stretch(count, 0.5, 0.75)
        assert third.progress(0) == whole.progress(20)
        assert third.progress(count) == whole.progress(30)
    assert factor(0.05, "cosine", 0.1) == pytest.approx(0.5)
    assert factor(0.1, "linear", 0.1) == 1.0
    assert factor(0.0, "constant", 0.1) == pytest.approx(0.01), "the first step is not lost"


def numbers(done: Trained) -> torch.Tensor:
    parts = [x.flatten() for f in done.adapter("own").values() for x in (f.A, f.B)]
    return torch.cat([*parts, *(unseal(e.value).flatten() for e in done.assembly.extras.values())])


@pytest.mark.parametrize("clip", [0.05, math.inf])
def test_examples_that_share_a_pass_have_the_gradients_of_examples_alone(
    clip: float, base: Base, examples: Any
) -> None:
    """In float64; frozen terms beside those that train, a term that trains in half, and a batch
    that is drawn by coins, so that its size changes from step to step.
    """
    terms = (
        Term("frozen", start(base, 2, 5), train=""),
        Term("own", start(base, 3, 1)),
        Term("half", start(base, 2, 2), train="B"),
    )
    step = Step(Assembly(terms, extras=head(base)))
    kernel = Kernel(base, TASK, unclipped(lr=1e-2, batch_size=4, local_steps=5))
    rows: list[int] = []
    hook = base.model.embeddings.register_forward_hook(
        lambda m, args, out: rows.append(out.shape[1])
    )
    try:
        guard = ExampleGuard(clip, 0.5 if clip < 1 else 0.0, of_seed(1, "test"))
        found = {}
        for together in (True, False):
            rows.clear()
            kernel.hooked.packs = together
            own = ExampleGuard(guard.clip, 0.0, guard.key)
            found[together] = kernel.train(step, examples, CLOCK, own)
            assert own.spent == [(4 / 13, 5)]
            assert (len(rows) < 10) == together, "five steps of about four examples"
    finally:
        hook.remove()
        kernel.close()
    before = numbers(Trained(step.assembly, 0.0, 0))
    moved = (numbers(found[False]) - before).norm()
    assert moved > 1e-3
    assert (numbers(found[True]) - numbers(found[False])).norm() <= 1e-9 * moved
    assert found[True].loss == pytest.approx(found[False].loss, abs=1e-12)
