"""``metric_base``: the head alone on the untouched base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import sentences, unclipped
from tests.training.test_kernel import TASK

from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base
from fedgrove.training.base_line import base_measure
from fedgrove.training.kernel import Kernel
from fedgrove.training.loop import batch_order


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


@pytest.fixture(scope="module")
def examples(base: Base) -> list[dict[str, Any]]:
    return TASK.encode(sentences(13, seed=1), base.processor)


def test_the_bases_head_alone_is_a_plain_loop_over_its_features(base: Base, examples: Any) -> None:
    options = unclipped(lr=3e-2, weight_decay=0.1, batch_size=3, accumulation=2, local_steps=4)
    options = options.model_copy(update={"clip": 0.01, "schedule": "cosine", "optimizer": "sgd"})
    initial = TASK.new_head(base.hidden, generator(3, "head"))
    train, test = examples[:9], examples[9:]
    kernel = Kernel(base, TASK, options)
    try:
        found = base_measure(kernel, initial, train, test, rounds=3, client="c", seed=5)
        features = kernel.features(train).clone()
        others = kernel.features(test).clone()
    finally:
        kernel.close()
    plain = {name: value.double().requires_grad_() for name, value in initial.items()}
    optimizer = torch.optim.AdamW(plain.values(), lr=3e-2, weight_decay=0.1)
    batches = batch_order(9, 6, generator(5, "base", "c", "order"))
    for _ in range(12):
        chosen = next(batches)
        batch = TASK.collate([train[i] for i in chosen], 0)
        optimizer.zero_grad()
        TASK.loss(TASK.head_logits(features[chosen], plain), batch).backward()
        optimizer.step()
    with torch.no_grad():
        scores = TASK.score(TASK.head_logits(others, plain), TASK.collate(test, 0))
    assert found["loss"] == pytest.approx(scores["loss"] / len(test), abs=1e-12)
    untouched = {name: value.double() for name, value in initial.items()}
    first = TASK.score(TASK.head_logits(others, untouched), TASK.collate(test, 0))
    assert abs(found["loss"] - first["loss"] / len(test)) > 1e-3, "nothing trained"
