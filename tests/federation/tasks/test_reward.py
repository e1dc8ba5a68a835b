"""Rewards: the Bradley-Terry loss, what is pooled, and that a constant says nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federation.tasks.test_prefer import pairs
from tests.tiny import save_bert, save_llama, unclipped

from fedgrove.adapters import Assembly, Extra, Term, fresh
from fedgrove.federation.tasks.reward import Reward
from fedgrove.ground.errors import DataError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base
from fedgrove.methods.contract import Step
from fedgrove.methods.head import PREFIX
from fedgrove.training.base_line import base_measure
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.loop import Clock

TASK = Reward(32)


@pytest.fixture(scope="module", params=["llama", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = {"llama": save_llama, "bert": save_bert}[request.param]
    return save(tmp_path_factory.mktemp(request.param) / "model")


def loaded(folder: Path, head: Any = "pooled") -> Base:
    return load_base(str(folder), task="reward", head=head, classes=1, dtype=torch.float64)


def head_of(base: Base) -> dict[str, torch.Tensor]:
    drawn = base.stock_head or TASK.new_head(base.hidden, generator(0, "head"))
    return {name: value.double() for name, value in drawn.items()}


def model(base: Base, head: dict[str, torch.Tensor], seed: int = 0) -> Assembly:
    adapter = fresh(base.sites, 2, 0.7, generator(seed, "A"), dtype=torch.float64)
    extras = {PREFIX + name: Extra(value) for name, value in head.items()}
    return Assembly((Term("own", adapter, train="AB"),), extras=extras)


def dense(base: Base, head: dict[str, torch.Tensor], example: dict[str, Any]) -> list[float]:
    """vᵀ pool of each answer, one sequence at a time."""
    rewards = []
    for before in ("input", "rejected"):
        inputs = {"input_ids": torch.tensor([list(example[f"{before}_ids"])])}
        kinds = "token_type_ids" if before == "input" else "rejected_token_type_ids"
        if kinds in example:
            inputs["token_type_ids"] = torch.tensor([list(example[kinds])])
        with torch.no_grad():
            states = base.model(**inputs).last_hidden_state[0]
        pooled = states[-1] if example["last"] else states.mean(0)
        rewards.append(float(head["weight"][0] @ pooled))
    return rewards


def test_measures_are_those_of_the_dense_formula(folder: Path) -> None:
    base = loaded(folder)
    kernel, head = Kernel(base, TASK, unclipped()), head_of(base)
    examples = TASK.encode(pairs(5), base.processor)
    assert {each["last"] for each in examples} == {base.model.config.model_type == "llama"}
    expected = [dense(base, head, each) for each in examples]
    found = kernel.logits(model(base, head), examples)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10)
    margins = [first - second for first, second in expected]
    measures = kernel.evaluate(model(base, head), examples)
    loss = sum(math.log1p(math.exp(-r)) for r in margins) / 5
    assert measures["loss"] == pytest.approx(loss, rel=1e-10)
    assert measures["accuracy"] == sum(r > 0 for r in margins) / 5
    assert measures["margin"] == pytest.approx(sum(margins) / 5, rel=1e-10)
    told = TASK.told(found)
    assert [each["rewards"] for each in told] == found.tolist()
    features = kernel.features(examples)
    assert features.shape == (5, base.hidden), "one of a pair, of both its answers"
    kernel.close()


@pytest.mark.parametrize("head", ["pooled", "stock"])
def test_rewards_are_learnt_and_a_constant_changes_nothing(folder: Path, head: str) -> None:
    base = loaded(folder, head)
    kernel = Kernel(base, TASK, unclipped(batch_size=4, local_steps=30, lr=1e-2))
    rows = pairs(12)
    examples = TASK.encode(rows, base.processor)
    start = model(base, head_of(base))
    trained = kernel.work(Work(Step(start), examples, Clock(0, ("c",)))).assembly
    found = kernel.evaluate(trained, TASK.encode(pairs(12, seed=5), base.processor))
    assert found["accuracy"] > 0.9
    biases = [name for name in trained.extras if name == f"{PREFIX}classifier.bias"]
    assert len(biases) == (head == "stock" and base.model.config.model_type == "bert")
    before = kernel.evaluate(trained, examples)
    for name in biases:
        assert torch.allclose(trained.extras[name].value, start.extras[name].value, atol=1e-9), (
            "it cancels, so it never moves"
        )
        moved = Extra(trained.extras[name].value + 3.0)
        shifted = Assembly(trained.terms, extras={**trained.extras, name: moved})
        assert kernel.evaluate(shifted, examples) == pytest.approx(before, rel=1e-9)
        assert not torch.allclose(
            kernel.logits(shifted, examples), kernel.logits(trained, examples), atol=1.0
        )
    batch = TASK.collate(examples, 0)
    logits = torch.randn(24, 1, dtype=torch.float64)
    assert torch.allclose(TASK.loss(logits, batch), TASK.loss(logits + 7.5, batch), rtol=1e-12)
    kernel.close()


def test_a_cohort_is_its_members_one_by_one(folder: Path) -> None:
    base = loaded(folder)
    kernel, head = Kernel(base, TASK, unclipped(batch_size=3, local_steps=4)), head_of(base)
    works = []
    for number in range(3):
        examples = TASK.encode(pairs(7, seed=number), base.processor)
        works.append(Work(Step(model(base, head, number)), examples, Clock(number, ("t",))))
    alone = [kernel.work(work) for work in works]
    together = kernel.train_together(works)
    for one, other in zip(alone, together, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-9)
        name = f"{PREFIX}weight"
        assert torch.allclose(
            one.assembly.extras[name].value, other.assembly.extras[name].value, rtol=1e-7
        )
    kernel.close()


def test_the_base_with_a_head_alone_is_measured(folder: Path) -> None:
    base = loaded(folder)
    kernel = Kernel(base, TASK, unclipped(batch_size=4, local_steps=10, lr=2e-2))
    examples = TASK.encode(pairs(12), base.processor)
    found = base_measure(kernel, head_of(base), examples, examples, rounds=3, client="c", seed=0)
    assert found["accuracy"] > 0.9
    kernel.close()


def test_pairs_that_are_alike_once_they_are_cut_are_named(folder: Path) -> None:
    base = loaded(folder)
    same = "it was a day and it was a film and"
    rows = [{"prompt": "what", "chosen": f"{same} good", "rejected": f"{same} bad"}, *pairs(1)]
    with pytest.raises(DataError, match=r"row 1 has two answers that are alike"):
        Reward(8).encode(rows, base.processor)
    assert Reward(8).truncated(rows, base.processor) >= 1
    with pytest.raises(DataError, match="row 1 has no 'chosen'; give a prompt and two answers"):
        TASK.encode([{"prompt": "what"}], base.processor)
