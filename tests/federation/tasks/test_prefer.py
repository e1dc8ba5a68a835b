"""DPO: its loss against dense float64 formulas, its reference, and what a client's examples keep."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tests.tiny import BAD, GOOD, save_llama, unclipped

from fedgrove.adapters import Assembly, Term, fresh
from fedgrove.federation.tasks.prefer import Prefer
from fedgrove.ground.errors import DataError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base
from fedgrove.methods.contract import Step
from fedgrove.privacy.example_dp import ExampleGuard
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.loop import Clock

TASK = Prefer(32, beta=0.3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    llama = save_llama(tmp_path_factory.mktemp("llama") / "llama")
    return load_base(str(llama), task="prefer", head="lm", dtype=torch.float64)


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        good, bad = draw.choice(GOOD), draw.choice(BAD)
        prompt = " ".join(["what is", *draw.choices(["not", "a", "day"], k=draw.randint(0, 4))])
        found.append({"prompt": prompt, "chosen": f"it was {good}", "rejected": f"{bad} film"})
    return found


def drawn(base: Base, seed: int, scale: float = 0.7) -> Assembly:
    """Both factors away from zero, so that the policy is not the base."""
    adapter = fresh(base.sites, 2, scale, generator(seed, "A"), dtype=torch.float64)
    rng = generator(seed, "B")
    for site, factors in adapter.items():
        B = 0.3 * torch.randn(factors.B.shape, generator=rng, dtype=torch.float64)
        adapter[site] = type(factors)(factors.A, B, factors.scale)
    return Assembly((Term("own", adapter, train="AB"),))


def start(base: Base, seed: int = 0) -> Assembly:
    adapter = fresh(base.sites, 2, 0.7, generator(seed, "A"), dtype=torch.float64)
    return Assembly((Term("own", adapter, train="AB"),))


def log_probability(base: Base, assembly: Assembly, prompt: list[int], answer: list[int]) -> Any:
    """Dense: whole weights, one sequence, one token after the other."""
    before = {}
    for term in assembly.terms:
        for site, factors in term.adapter.items():
            weight = base.model.get_submodule(site).weight
            before[site] = weight.data
            weight.data = weight.data + factors.scale * factors.B @ factors.A
    with torch.no_grad():
        logits = base.model(torch.tensor([prompt + answer])).logits[0]
    for site, weight in before.items():
        base.model.get_submodule(site).weight.data = weight
    total = 0.0
    for place, token in enumerate(answer, start=len(prompt)):
        row = logits[place - 1]
        total += float(row[token] - torch.logsumexp(row, 0))
    return total


def test_measures_are_those_of_the_dense_formula(base: Base) -> None:
    task = Prefer(32, beta=0.3, label_smoothing=0.1)
    kernel = Kernel(base, task, unclipped())
    examples = task.encode(pairs(5), base.processor)
    model = drawn(base, 1)
    margins, ratios = [], []
    for each in examples:
        prompt = list(each["input_ids"][: each["start"]])
        own = []
        for ids in (each["input_ids"], each["rejected_ids"]):
            answer = list(ids[each["start"] :])
            assert answer[-1] == base.processor.eos_token_id, "the end is a part of an answer"
            policy = log_probability(base, model, prompt, answer)
            own.append(policy - log_probability(base, Assembly(), prompt, answer))
        ratios.append(own[0])
        margins.append(0.3 * (own[0] - own[1]))
    losses = []
    for h in margins:
        right, wrong = math.log1p(math.exp(-h)), math.log1p(math.exp(h))
        losses.append(0.9 * right + 0.1 * wrong)
    expected = {
        "loss": sum(losses) / 5,
        "accuracy": sum(h > 0 for h in margins) / 5,
        "margin": sum(margins) / 5,
        "chosen_log_ratio": sum(ratios) / 5,
        "examples": 5.0,
    }
    assert 0 < expected["accuracy"] < 1
    assert kernel.evaluate(model, examples) == pytest.approx(expected, rel=1e-10)
    told = task.told(kernel.logits(model, examples))
    assert [each["margin"] for each in told] == pytest.approx(margins, rel=1e-10)
    for each, h in zip(told, margins, strict=True):
        assert each["preferred"] == ("first" if h > 0 else "second")
        assert each["probability_first"] == pytest.approx(1 / (1 + math.exp(-h)))
    kernel.close()


def test_at_the_reference_the_loss_is_log_2_and_its_gradient_pulls_the_answers_apart(
    base: Base,
) -> None:
    """``∇ loss = −β/2 ∇ log(π⁺/π⁻)`` there (Rafailov et al., section 4)."""
    kernel = Kernel(base, TASK, unclipped())
    examples = TASK.encode(pairs(4), base.processor)
    found = kernel.evaluate(Assembly(), examples)
    assert found["loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert found["accuracy"] == 0.5
    assert found["margin"] == found["chosen_log_ratio"] == 0.0

    def gradients(scaled: bool) -> list[torch.Tensor]:
        with kernel.opened(start(base), train=True) as live:
            batch = kernel._batch(examples)
            with kernel.hooked.running(batch, live):
                kernel._prepare([live], batch)
                logits = kernel.reader.logits({}, batch)
                whole = TASK.loss(logits, batch)
                if scaled:
                    ratios = TASK.by_example(logits, {**batch, "reference": torch.zeros(8)})
                    whole = -TASK.beta / 2 * (ratios[:, 0] - ratios[:, 1]).mean()
                grads = torch.autograd.grad(whole, live.leaves, allow_unused=True)
        return [grad for grad in grads if grad is not None]

    ours, published = gradients(False), gradients(True)
    assert max(float(grad.abs().max()) for grad in ours) > 1e-4
    for own, theirs in zip(ours, published, strict=True):
        assert torch.allclose(own, theirs, rtol=1e-9, atol=1e-14)
    kernel.close()


def test_exchanged_answers_flip_the_margin(base: Base) -> None:
    kernel = Kernel(base, TASK, unclipped())
    rows = pairs(4)
    other = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    model = drawn(base, 2)
    found = [
        TASK.margins(kernel.logits(model, TASK.encode(own, base.processor)))
        for own in (rows, other)
    ]
    assert float(found[0].abs().min()) > 1e-6
    assert torch.allclose(found[0], -found[1], rtol=1e-9)
    kernel.close()


def test_the_reference_is_computed_once_and_is_the_untouched_base(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(base, TASK, unclipped(batch_size=3, local_steps=6, lr=1e-2))
    examples = TASK.encode(pairs(6), base.processor)
    asked: list[int] = []
    plain = Kernel._answers

    def counted(self: Kernel, assembly: Assembly, own: Any) -> Any:
        if not assembly.terms:
            asked.append(len(own))
        return plain(self, assembly, own)

    monkeypatch.setattr(Kernel, "_answers", counted)
    work = Work(Step(start(base)), examples, Clock(0, ("c",)))
    trained = kernel.work(work)
    kept = [each["reference"].clone() for each in examples]
    kernel.evaluate(trained.assembly, examples)
    kernel.work(Work(Step(trained.assembly), examples, Clock(1, ("c",))))
    assert asked == [6]
    for each, numbers in zip(examples, kept, strict=True):
        prompt = list(each["input_ids"][: each["start"]])
        answer = list(each["rejected_ids"][each["start"] :])
        assert torch.equal(each["reference"], numbers)
        expected = log_probability(base, Assembly(), prompt, answer)
        assert float(numbers[1]) == pytest.approx(expected, rel=1e-10)
    kernel.close()


def test_training_prefers_what_is_preferred(base: Base) -> None:
    kernel = Kernel(base, TASK, unclipped(batch_size=4, local_steps=30, lr=2e-2))
    examples = TASK.encode(pairs(12), base.processor)
    trained = kernel.work(Work(Step(start(base)), examples, Clock(0, ("c",))))
    new = TASK.encode(pairs(12, seed=5), base.processor)
    found = kernel.evaluate(trained.assembly, new)
    assert found["accuracy"] > 0.9
    assert found["margin"] > 0.1
    kernel.close()


def test_a_cohort_is_its_members_one_by_one(base: Base) -> None:
    kernel = Kernel(base, TASK, unclipped(batch_size=3, local_steps=4, lr=1e-2))
    assert kernel.hooked.packs
    works = []
    for number in range(3):
        examples = TASK.encode(pairs(7, seed=number), base.processor)
        works.append(Work(Step(start(base, number)), examples, Clock(number, ("t",))))
    alone = [kernel.work(work) for work in works]
    together = kernel.train_together(works)
    for one, other in zip(alone, together, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-9)
        for site, factors in one.assembly.terms[0].adapter.items():
            twin = other.assembly.terms[0].adapter[site]
            assert torch.allclose(factors.B, twin.B, rtol=1e-7, atol=1e-12)
    kernel.close()


def test_each_pair_is_one_example_of_example_privacy(base: Base) -> None:
    """A pair's gradient is clipped as one: with a wide bound and no noise the step is the plain one
    on the pairs that were drawn.
    """
    found = []
    for together in (True, False):
        kernel = Kernel(base, TASK, unclipped(batch_size=8, local_steps=1, optimizer="sgd", lr=1.0))
        kernel.hooked.packs &= together  # without: one pair at a time
        examples = TASK.encode(pairs(8), base.processor)
        guard = ExampleGuard(clip=1e-3, noise=0.0, key="00" * 32)
        work = Work(Step(start(base)), examples, Clock(3, ("c",)), guard)
        trained = kernel.work(work).assembly.terms[0].adapter
        found.append(torch.cat([each.B.flatten() for each in trained.values()]))
        kernel.close()
    assert 0 < float(found[0].norm()) <= 1e-3 * (1 + 1e-9), "eight clipped gradients, their mean"
    assert torch.allclose(found[0], found[1], rtol=1e-7, atol=1e-15)


def test_answers_that_are_alike_once_they_are_cut_are_named(base: Base) -> None:
    task = Prefer(8)
    same = "it was a day and it was a film and"
    rows = [*pairs(2), {"prompt": "what", "chosen": f"{same} good", "rejected": f"{same} bad"}]
    with pytest.raises(DataError, match=r"row 3 has two answers that are alike .*max_length = 8"):
        task.encode(rows, base.processor)
    with pytest.raises(DataError, match=r"rows 1 and 2 have two answers"):
        task.encode([rows[2]] * 2, base.processor)
    assert task.truncated(rows, base.processor) >= 1
    assert max(task.lengths(rows, base.processor)) > 8
    with pytest.raises(DataError, match="row 1 has no 'rejected'; give a prompt and two answers"):
        task.encode([{"prompt": "what", "chosen": "good"}], base.processor)


def test_a_prompt_alone_is_written_after(base: Base) -> None:
    kernel = Kernel(base, TASK, unclipped())
    examples = TASK.encode([{"prompt": "what is good"}], base.processor)
    (text,) = kernel.generate(drawn(base, 1), examples)
    assert isinstance(text, str)
    assert kernel.logits(Assembly(), examples).shape[0] == 1
    kernel.close()
