"""Readers: a task with a label for each token, and several label tensors, needs no reader of its
own; a task that a model cannot be read for is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from tests.tiny import sentences, unclipped
from tests.training.test_kernel import CLOCK, start
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters import Assembly, Extra, Term
from fedgrove.federation.tasks.base import Batch, Example
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.federation.tasks.generate import Generate
from fedgrove.ground.errors import JobError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base
from fedgrove.methods.contract import Step
from fedgrove.training.base_line import base_measure
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.lanes import Lanes
from fedgrove.training.readers import Pooled, Reader


@dataclass(frozen=True)
class TokensAndTexts(ClassifyText):
    """A toy: is a token's number odd (a label for each token), and how many tokens has the text."""

    level: ClassVar[Literal["example", "token"]] = "token"

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        batch = super().collate(examples, pad_id)
        odd = batch["input_ids"] % 2
        batch["labels"] = torch.where(batch["attention_mask"].bool(), odd, -100)
        batch["counts"] = batch["attention_mask"].sum(1).double()
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """[b, t, 2] -> the mean over tokens, and how far the texts' mean logit is from a count."""
        tokens = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        mask = batch["attention_mask"]
        texts = (logits[..., 0] * mask).sum(1) / mask.sum(1)
        return tokens + 0.01 * F.mse_loss(texts, batch["counts"])

    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        known = batch["labels"] != -100
        right = (logits.argmax(-1) == batch["labels"]) & known
        return {
            "loss": float(self.loss(logits, batch)) * len(known),
            "correct": float(right.sum()) * len(known) / float(known.sum()),
            "examples": float(len(known)),
        }


TASK = TokensAndTexts(labels=("negative", "positive"), max_length=32)


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


def head(base: Base, seed: int) -> Mapping[str, Extra]:
    values = TASK.new_head(base.hidden, generator(seed, "head"))
    return {f"head.{name}": Extra(value.double()) for name, value in values.items()}


@pytest.mark.parametrize("packs", [True, False])
def test_a_task_with_labels_of_tokens_trains_in_a_cohort_as_alone(base: Base, packs: bool) -> None:
    kernel = Kernel(base, TASK, unclipped(lr=1e-2, batch_size=3, local_steps=4))
    kernel.hooked.packs = packs
    works = []
    for seed in range(3):
        examples = TASK.encode(sentences(9, seed=seed), base.processor)
        assembly = Assembly((Term("own", start(base, 2, seed)),), extras=head(base, seed))
        works.append(Work(Step(assembly), examples, CLOCK))
    try:
        together = Lanes([kernel]).train(works)
        alone = [kernel.work(work) for work in works]
        measures = kernel.evaluate(alone[0].assembly, works[0].examples)
        start_measures = kernel.evaluate(works[0].step.assembly, works[0].examples)
    finally:
        kernel.close()
    for work, ours, theirs in zip(works, together, alone, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-10)
        for name, before in work.step.assembly.adapter("own").items():
            moved = (theirs.adapter("own")[name].B - before.B).norm()
            assert moved > 1e-4
            difference = ours.adapter("own")[name].B - theirs.adapter("own")[name].B
            assert difference.norm() <= 1e-9 * moved
    assert measures["loss"] < start_measures["loss"], "it learns"
    assert 0 <= measures["accuracy"] <= 1


def test_its_base_is_measured_with_the_head_trained_inside_the_kernel(base: Base) -> None:
    examples = TASK.encode(sentences(9, seed=1), base.processor)
    kernel = Kernel(base, TASK, unclipped(lr=3e-2, batch_size=3, local_steps=4))
    initial = TASK.new_head(base.hidden, generator(0, "head"))
    try:
        assert not kernel.reader.head_sees_features
        untrained = Assembly(extras={f"head.{n}": Extra(v) for n, v in initial.items()})
        before = kernel.evaluate(untrained, examples)
        found = base_measure(kernel, initial, examples, examples, rounds=2, client="c", seed=0)
    finally:
        kernel.close()
    assert found["loss"] < 0.9 * before["loss"]


def test_a_task_that_a_model_is_not_read_for_is_refused(base: Base) -> None:
    with pytest.raises(JobError, match=r"'generate' reads a model by 'lm', but .* for 'pooled'"):
        Kernel(base, Generate(), unclipped())


def test_a_reader_that_asks_more_of_its_logits_is_a_subclass(base: Base) -> None:
    """The reference of a preference is the same model without adapters: ``bare`` gives it."""

    class Beside(Pooled):
        """Logits less those of the untouched base."""

        def logits(self, head: Any, batch: Batch) -> Tensor:
            """[b, t, c]"""
            with self.hooked.instead(None), torch.no_grad():
                plain = super().logits(head, batch)
            return super().logits(head, batch) - plain

    examples = TASK.encode(sentences(4, seed=1), base.processor)
    extras = head(base, 0)
    assembly = Assembly((Term("own", start(base)),), extras=extras)
    kernel = Kernel(base, TASK, unclipped())
    try:
        usual: list[Tensor] = []
        for reader in (kernel.reader, Beside(kernel.hooked, TASK)):
            assert isinstance(reader, Reader)
            for chosen in (assembly, Assembly(extras=extras)):
                with kernel.opened(chosen, train=False) as live, torch.inference_mode():
                    for _, batch in kernel.passes(live, examples):
                        usual.append(reader.logits(live.head, batch))
    finally:
        kernel.close()
    adapted, plain, difference, nothing = usual
    assert torch.allclose(adapted - plain, difference, atol=1e-12)
    assert difference.abs().max() > 1e-3
    assert not nothing.any()
