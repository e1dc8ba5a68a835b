"""Language models through the kernel: exact logits, exact greedy texts, whatever the batch and the
precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import exchanges, save_llama, unclipped
from torch import Tensor

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.federation.tasks.generate import Generate, Template
from fedgrove.interop.models import Base, load_base
from fedgrove.methods.contract import Step
from fedgrove.training.kernel import Kernel
from fedgrove.training.live import LiveAssembly
from fedgrove.training.loop import Clock
from fedgrove.training.measured import written
from fedgrove.training.readers import Found

TASK = Generate(max_length=40, max_new_tokens=12, generate_examples=4)


def base_of(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Base:
    return load_base(str(folder), task="generate", head="lm", dtype=dtype, **options)


def adapter_of(base: Base, seed: int = 0, size: float = 0.3) -> dict[str, Factors]:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, site in base.sites.items():
        A = torch.randn(3, site.in_features, generator=draw, dtype=torch.float64) * size
        B = torch.randn(site.out_features, 3, generator=draw, dtype=torch.float64) * size
        found[name] = Factors(A.to(base.adapter_dtype), B.to(base.adapter_dtype), 0.7)
    return found


def assembly_of(base: Base, train: str = "AB", **options: Any) -> Assembly:
    return Assembly((Term("own", adapter_of(base, **options), train=train),))


def plain_logits(base: Base, adapter: dict[str, Factors], ids: Tensor) -> Tensor:
    """The model with the adapter folded into its weights, on one unpadded row."""
    kept = {}
    for name, factors in adapter.items():
        linear = base.model.get_submodule(name)
        kept[name] = linear.weight.data
        linear.weight.data = linear.weight.data + factors.product()
    try:
        with torch.inference_mode():
            return base.model(input_ids=ids[None]).logits[0].clone()
    finally:
        for name, weight in kept.items():
            base.model.get_submodule(name).weight.data = weight


@contextmanager
def running(
    kernel: Kernel, assembly: Assembly, batch: Any, train: bool = False
) -> Iterator[LiveAssembly]:
    with kernel.opened(assembly, train=train) as live, kernel.hooked.running(batch, live):
        yield live


@pytest.fixture
def kernel(tiny_llama: Path) -> Kernel:
    return Kernel(base_of(tiny_llama), TASK, unclipped(lr=1e-2, batch_size=4, local_steps=4))


def test_logits_at_the_completion_are_those_of_the_plain_model(kernel: Kernel) -> None:
    base = kernel.base
    assembly = assembly_of(base)
    examples = TASK.encode(exchanges(6, seed=1), base.processor)
    batch = kernel._batch(examples)
    expected = []
    for example in examples:
        whole = plain_logits(base, adapter_of(base), torch.tensor(example["input_ids"]))
        (span,) = example["spans"]  # the completion alone, to the end
        expected.append(whole[span[0] - 1 : -1])
    sizes: list[torch.Size] = []
    hook = base.model.get_output_embeddings().register_forward_hook(
        lambda m, a, out: sizes.append(out.shape)
    )
    with torch.inference_mode(), running(kernel, assembly, batch) as live:
        logits = kernel.reader.logits(live.head, batch)
    hook.remove()
    assert torch.allclose(logits, torch.cat(expected), atol=1e-11)
    assert sizes == [logits.shape]  # nothing else reached the output layer
    losses = torch.nn.functional.cross_entropy(logits, TASK._asked(batch), reduction="sum")
    assert kernel.evaluate(assembly, examples)["loss"] * len(logits) == pytest.approx(
        float(losses), abs=1e-9
    )


def test_an_adapted_output_layer_keeps_its_adapter(tmp_path: Path) -> None:
    base = base_of(save_llama(tmp_path / "untied", tied=False), targets=["q_proj", "lm_head"])
    kernel = Kernel(base, TASK, unclipped())
    example = TASK.encode(exchanges(1, seed=2), base.processor)[0]
    batch = kernel._batch([example])
    with torch.inference_mode(), running(kernel, assembly_of(base), batch) as live:
        logits = kernel.reader.logits(live.head, batch)
    ((start, _),) = example["spans"]
    whole = plain_logits(base, adapter_of(base), torch.tensor(example["input_ids"]))
    expected = whole[start - 1 : -1]
    assert torch.allclose(logits, expected, atol=1e-11)


def test_gradients_are_those_of_the_plain_loss(kernel: Kernel) -> None:
    base = kernel.base
    batch = kernel._batch(TASK.encode(exchanges(5, seed=3), base.processor))
    kernel.hooked.packs = False
    with running(kernel, assembly_of(base), batch, train=True) as live:
        TASK.loss(kernel.reader.logits(live.head, batch), batch).backward()
        found = [leaf.grad for leaf in live.leaves]
        whole = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        shifted = whole.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            shifted, batch["labels"][:, 1:].flatten(), ignore_index=-100
        )
        expected = torch.autograd.grad(loss, live.leaves)
    assert found
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert torch.allclose(one, other, atol=1e-12)


def greedy(
    base: Base, adapter: dict[str, Factors], prompt: list[int], most: int, ends: list[int]
) -> list[int]:
    """One token at a time, from all logits, without cache or padding."""
    ids = list(prompt)
    for _ in range(most):
        token = int(plain_logits(base, adapter, torch.tensor(ids))[-1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch", [1, 5])
def test_texts_are_those_of_a_plain_loop_in_any_batch(tiny_llama: Path, batch: int) -> None:
    base = base_of(tiny_llama)
    kernel = Kernel(base, TASK, unclipped(eval_batch_size=batch))
    rows = [{"prompt": row["prompt"]} for row in exchanges(5, seed=4)]
    examples = TASK.encode(rows, base.processor)
    assert len({len(example["prompt_ids"]) for example in examples}) > 1  # there is padding
    ends = Template(base.processor).ends()
    for seed in (0, 1):
        adapter = adapter_of(base, seed=seed)
        expected = [greedy(base, adapter, example["prompt_ids"], 12, ends) for example in examples]
        texts = [base.processor.decode(ids, skip_special_tokens=True).strip() for ids in expected]
        assert kernel.generate(assembly_of(base, seed=seed), examples) == texts
        assert len(set(texts)) > 1
    assert kernel.generate(assembly_of(base), examples, most=2) != kernel.generate(
        assembly_of(base), examples
    )


def test_texts_end_where_the_model_ends_them(kernel: Kernel) -> None:
    """Trained on one answer, the model writes it and stops."""
    base = kernel.base
    rows = [{"prompt": "what is not good", "completion": "it was bad", "label": ""}]
    examples = TASK.encode(rows, base.processor)
    step = Step(assembly_of(base, size=0.05), epochs=120.0)
    trained = kernel.train(step, examples, Clock(0, (1, "a"))).assembly
    assert kernel.generate(trained, examples) == ["it was bad"]
    measures = kernel.evaluate(trained, examples)
    assert measures["exact_match"] == measures["rouge_l"] == 1.0
    assert measures["perplexity"] < 1.5


def test_what_was_written_is_kept_for_those_who_ask(kernel: Kernel) -> None:
    base = kernel.base
    examples = TASK.encode(exchanges(9, seed=5), base.processor)
    found: Found = {}
    kernel.evaluate(assembly_of(base), examples, found)
    assert list(found) == [0, 2, 4, 6]
    assert written(found) == kernel.generate(assembly_of(base), [examples[i] for i in (0, 2, 4, 6)])


def test_checkpointed_activations_change_nothing(tiny_llama: Path) -> None:
    rows = exchanges(4, seed=6)
    found = []
    for checkpointing in (False, True):
        base = base_of(tiny_llama, gradient_checkpointing=checkpointing)
        kernel = Kernel(base, TASK, unclipped(lr=1e-2, batch_size=4, local_steps=3))
        examples = TASK.encode(rows, base.processor)
        trained = kernel.train(Step(assembly_of(base, size=0.05)), examples, Clock(0, (1, "a")))
        found.append((trained.loss, kernel.generate(trained.assembly, examples)))
        assert base.model.training == checkpointing
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    assert found[0][1] == found[1][1]


def test_in_bfloat16_plain_attention_looks_back_only(tiny_llama: Path) -> None:
    """Training in bfloat16 on a CPU computes attention plainly: the same losses, up to bfloat16's
    precision.
    """
    base = base_of(tiny_llama, torch.bfloat16)
    exact = base_of(tiny_llama, torch.float64)
    rows = exchanges(8, seed=7)
    losses = []
    for each in (base, exact):
        kernel = Kernel(each, TASK, unclipped(lr=1e-6, batch_size=8, local_steps=1))
        examples = TASK.encode(rows, each.processor)
        losses.append(kernel.train(Step(assembly_of(each)), examples, Clock(0, (1, "a"))).loss)
        losses.append(kernel.evaluate(assembly_of(each), examples)["loss"])
    low, low_evaluated, high, high_evaluated = losses
    assert low == pytest.approx(high, rel=0.02)
    assert low_evaluated == pytest.approx(high_evaluated, rel=0.02)


def test_features_are_of_the_prompt_and_reach_every_token(tiny_llama: Path) -> None:
    """FedDPA's mix weighs terms by the instance: in training, scoring and writing alike."""
    from fedgrove.adapters.assembly import Junction, Mix

    seen: list[Tensor] = []

    class Watching(Mix):
        linear = False
        needs_features = True

        def weigh(self, at: Junction) -> list[Any]:
            assert at.features is not None
            seen.append(at.features)
            return [at.features.mean(1)[:, None, None] for _ in at.terms]

    base = base_of(tiny_llama)
    kernel = Kernel(base, TASK, unclipped())
    rows = exchanges(3, seed=8)
    examples = TASK.encode(rows, base.processor)
    assembly = Assembly((Term("own", adapter_of(base), train="AB"),), mix=Watching())
    kernel.evaluate(assembly, examples)
    order = sorted(range(3), key=lambda i: (len(examples[i]["input_ids"]), i))
    expected = kernel.features(
        TASK.encode([{"prompt": row["prompt"]} for row in rows], base.processor)
    )[order]
    assert all(torch.allclose(each, expected, atol=1e-11) for each in seen)
    assert len(seen) > 2 * len(base.sites)  # the texts' tokens too
