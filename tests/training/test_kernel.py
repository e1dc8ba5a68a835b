"""The kernel against plain PEFT in float64, and what its options do."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import sentences, unclipped
from torch import Tensor, nn

from fedgrove.adapters import (
    Assembly,
    Convex,
    Extra,
    Factors,
    Term,
    Weighted,
    as_one_adapter,
    fresh,
)
from fedgrove.adapters.private import PrivacyError, is_private
from fedgrove.adapters.tree import pack
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base
from fedgrove.job.sections import TrainSection
from fedgrove.methods.contract import Step
from fedgrove.training.kernel import Kernel
from fedgrove.training.loop import Clock, batch_order, parted

CLOCK = Clock(7, (1, "client"))
TASK = ClassifyText(labels=("negative", "positive"), max_length=32)


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


@pytest.fixture(scope="module")
def examples(base: Base) -> list[dict[str, Any]]:
    return TASK.encode(sentences(22, seed=1), base.processor)


def start(base: Base, rank: int = 3, seed: int = 0) -> dict[str, Factors]:
    """An adapter whose B is not zero, so that both factors get gradients from the first step."""
    adapter = fresh(base.sites, rank, 0.7, generator(seed, "adapter"), dtype=torch.float64)
    draw = generator(seed, "B")
    return {
        name: Factors(
            f.A, 0.1 * torch.randn(f.B.shape, generator=draw, dtype=torch.float64), f.scale
        )
        for name, f in adapter.items()
    }


def head(base: Base) -> dict[str, Extra]:
    values = TASK.new_head(base.hidden, generator(3, "head"))
    return {f"head.{name}": Extra(value.double()) for name, value in values.items()}


def peft_train(
    folder: Path, adapter: Any, head_values: dict[str, Tensor], examples: Any, options: TrainSection
) -> Any:
    """The same work in PEFT and a plain loop: the reference."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(str(folder), dtype=torch.float64)
    pad = AutoTokenizer.from_pretrained(str(folder)).pad_token_id
    rank = next(iter(adapter.values())).rank
    config = LoraConfig(r=rank, lora_alpha=1, target_modules=sorted(adapter), lora_dropout=0.0)
    peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    for module in peft.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    layers = {
        n.removeprefix("base_model.model."): m
        for n, m in peft.named_modules()
        if hasattr(m, "lora_A")
    }
    for name, factors in adapter.items():
        layers[name].scaling["default"] = factors.scale
        layers[name].lora_A["default"].weight.data = factors.A.clone()
        layers[name].lora_B["default"].weight.data = factors.B.clone()
    head = {name: value.clone().requires_grad_() for name, value in head_values.items()}
    parameters = [p for p in peft.parameters() if p.requires_grad] + list(head.values())
    if options.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    batches = batch_order(
        len(examples), options.batch_size, generator(CLOCK.seed, *CLOCK.keys, "train", "order")
    )
    for index in range(options.local_steps or 0):
        if options.schedule == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = (
                    options.lr * 0.5 * (1 + math.cos(math.pi * index / (options.local_steps or 1)))
                )
        optimizer.zero_grad()
        for _ in range(options.accumulation):
            batch = TASK.collate([examples[i] for i in next(batches)], pad)
            hidden = peft(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).last_hidden_state
            logits = TASK.head_logits(TASK.pool(hidden, batch), head)
            (TASK.loss(logits, batch) / options.accumulation).backward()
        if options.clip:
            nn.utils.clip_grad_norm_(parameters, options.clip)
        optimizer.step()
    return {
        name: (layers[name].lora_A["default"].weight, layers[name].lora_B["default"].weight)
        for name in adapter
    }, head


@pytest.mark.parametrize(
    "options",
    [
        unclipped(lr=1e-2, weight_decay=0.1, batch_size=4, local_steps=7),
        unclipped(optimizer="sgd", lr=0.5, momentum=0.9, batch_size=5, local_steps=7),
        unclipped(
            lr=1e-2, clip=0.05, accumulation=2, schedule="cosine", batch_size=3, local_steps=5
        ),
    ],
    ids=["adamw", "sgd", "clip-accumulate-cosine"],
)
def test_training_equals_plain_peft(
    tiny_bert: Path, base: Base, examples: Any, options: TrainSection
) -> None:
    adapter, extras = start(base), head(base)
    kernel = Kernel(base, TASK, options)
    try:
        trained = kernel.train(
            Step(Assembly((Term("own", adapter),), extras=extras)), examples, CLOCK
        )
    finally:
        kernel.close()
    reference, reference_head = peft_train(
        tiny_bert,
        adapter,
        {n.removeprefix("head."): e.value for n, e in extras.items()},
        examples,
        options,
    )
    assert trained.steps == options.local_steps
    for name, before in adapter.items():
        after = trained.adapter("own")[name]
        for ours, theirs, old in zip(
            (after.A, after.B), reference[name], (before.A, before.B), strict=True
        ):
            moved = (theirs - old).norm()
            assert moved > 1e-5, "the reference did not train, so equality would mean nothing"
            assert (ours - theirs).norm() <= 1e-9 * moved
    for name, value in reference_head.items():
        assert torch.allclose(trained.extra(f"head.{name}"), value, rtol=0, atol=1e-10)


def test_every_mix_equals_the_dense_formula(base: Base, examples: Any) -> None:
    """λ · first + (1 − λ) · second, a frozen base delta and a diagonal, against one dense update
    per site.
    """
    first, second, delta = start(base, 3, 1), start(base, 2, 2), start(base, 4, 3)
    diagonal = {name: torch.linspace(0.5, 2.0, 3, dtype=torch.float64) for name in first}
    extras = {"lambda.1": Extra(torch.tensor(0.3, dtype=torch.float64)), **head(base)}
    assembly = Assembly(
        (Term("first", first, diagonal=diagonal, unit=True), Term("second", second)),
        mix=Convex("first", "second"),
        extras=extras,
        base_delta=delta,
    )
    kernel = Kernel(base, TASK, unclipped())
    got = kernel.logits(assembly, examples)
    one = as_one_adapter(assembly, base.sites)
    again = kernel.logits(Assembly((Term("one", one),), extras=head(base)), examples)
    kernel.close()
    weights = {}
    share = torch.sigmoid(torch.tensor(0.3, dtype=torch.float64))
    for name, site in base.sites.items():
        A = first[name].A / first[name].A.norm(dim=1, keepdim=True)
        B = first[name].B / first[name].B.norm(dim=0, keepdim=True)
        update = 0.7 * B @ torch.diag(diagonal[name]) @ A
        if site.layer == 1:
            update = share * update + (1 - share) * second[name].product()
        weights[name] = update + delta[name].product()
    modules = dict(base.model.named_modules())
    originals = {name: modules[name].weight.data.clone() for name in weights}
    for name, update in weights.items():
        modules[name].weight.data += update
    plain = Kernel(base, TASK, unclipped())
    expected = plain.logits(Assembly(extras=head(base)), examples)
    plain.close()
    for name, original in originals.items():
        modules[name].weight.data = original
    assert (expected - got).abs().max() < 1e-12
    assert (expected - again).abs().max() < 1e-12


def test_only_what_trains_moves_and_private_terms_come_back_sealed(
    base: Base, examples: Any
) -> None:
    kernel = Kernel(base, TASK, unclipped(lr=1e-2, local_steps=2, batch_size=4))
    terms = (
        Term("frozen", start(base, 2, 1), train=""),
        Term("half", start(base, 2, 2), train="B", kept="B"),
        Term("own", start(base, 2, 3), home="client"),
    )
    trained = kernel.train(Step(Assembly(terms, extras=head(base))), examples, CLOCK)
    kernel.close()
    for name in base.sites:
        assert torch.equal(trained.adapter("frozen")[name].B, terms[0].adapter[name].B)
        assert torch.equal(trained.adapter("half")[name].A, terms[1].adapter[name].A)
        assert is_private(trained.adapter("half")[name].B)
        assert not is_private(trained.adapter("half")[name].A)
        assert is_private(trained.adapter("own")[name].A)
    for leak in (
        trained.adapter("own"),
        {"x": trained.adapter("half")},
        {"mean": [trained.extra("head.bias") * 2]},
    ):
        with pytest.raises(PrivacyError, match="private"):
            pack({"leak": leak})


def test_the_base_never_changes(base: Base, examples: Any) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    kernel = Kernel(base, TASK, unclipped(lr=0.1, local_steps=2))
    kernel.train(Step(Assembly((Term("own", start(base)),), extras=head(base))), examples, CLOCK)
    kernel.close()
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_fixed_weights_scale_a_term(base: Base, examples: Any) -> None:
    adapter = start(base)
    kernel = Kernel(base, TASK, unclipped())
    half = kernel.logits(
        Assembly((Term("t", adapter),), mix=Weighted({"t": 0.5}), extras=head(base)), examples
    )
    scaled = {n: Factors(f.A, f.B, f.scale / 2) for n, f in adapter.items()}
    same = kernel.logits(Assembly((Term("t", scaled),), extras=head(base)), examples)
    other = kernel.logits(Assembly((Term("t", adapter),), extras=head(base)), examples)
    kernel.close()
    assert torch.allclose(half, same, atol=1e-12)
    assert not torch.allclose(half, other, atol=1e-6)


def test_a_penalty_adds_to_the_loss(base: Base, examples: Any) -> None:
    """A strong penalty on ‖B‖² shrinks B; without it B grows."""
    kernel = Kernel(base, TASK, unclipped(optimizer="sgd", lr=0.05, local_steps=6, batch_size=4))
    assembly = Assembly((Term("own", start(base)),), extras=head(base))

    def norm(penalty: Any) -> float:
        after = kernel.train(Step(assembly, penalty=penalty), examples, CLOCK).adapter("own")
        return sum(float(f.B.pow(2).sum()) for f in after.values())

    plain = norm(None)
    pressed = norm(lambda live: 2.0 * sum(f.B.pow(2).sum() for f in live.terms["own"].values()))
    kernel.close()
    assert pressed < 0.5 * plain


def test_the_reported_loss_is_the_tasks_without_the_penalty(base: Base, examples: Any) -> None:
    kernel = Kernel(base, TASK, unclipped(local_steps=2, batch_size=4))
    assembly = Assembly((Term("own", start(base)),), extras=head(base))
    plain = kernel.train(Step(assembly), examples, CLOCK)
    constant = kernel.train(Step(assembly, penalty=lambda live: torch.tensor(7.0)), examples, CLOCK)
    kernel.close()
    assert constant.loss == plain.loss


def test_fisher_scores_are_the_mean_squared_gradients(base: Base, examples: Any) -> None:
    adapter = start(base)
    kernel = Kernel(base, TASK, unclipped(batch_size=len(examples)))
    assembly = Assembly((Term("own", adapter, train="B"),), extras=head(base))
    trained = kernel.train(Step(assembly, measure="fisher"), examples, CLOCK)
    # one batch: one SGD step of rate 1 moves B by exactly minus the gradient
    moved = Kernel(
        base, TASK, unclipped(optimizer="sgd", lr=1.0, local_steps=1, batch_size=len(examples))
    )
    after = moved.train(Step(assembly), examples, CLOCK).adapter("own")
    kernel.close()
    moved.close()
    assert trained.scores is not None
    for name, factors in adapter.items():
        gradient = factors.B - after[name].B
        assert torch.allclose(trained.scores["own"][name].B, gradient**2, atol=1e-14)
        assert trained.scores["own"][name].A.abs().max() == 0


def test_a_measured_loss_is_the_mean_over_examples_and_trains_nothing(
    base: Base, examples: Any
) -> None:
    kernel = Kernel(base, TASK, unclipped(batch_size=3))
    assembly = Assembly((Term("own", start(base)),), extras=head(base))
    found = kernel.train(Step(assembly, measure="loss"), examples, CLOCK)
    each = [
        kernel.train(Step(assembly, measure="loss"), [example], CLOCK).loss for example in examples
    ]
    kernel.close()
    assert found.steps == 0
    assert found.assembly is assembly
    assert found.loss == pytest.approx(sum(each) / len(each), rel=1e-9)


def test_parts_of_the_examples_are_the_same_in_all_rounds_and_apart() -> None:
    examples: Any = [{"number": number} for number in range(11)]
    first, later = Clock(3, (1, "a")), Clock(3, (2, "a"))

    def seen(part: tuple[float, float], clock: Clock) -> list[int]:
        return [each["number"] for each in parted(examples, part, clock)]

    assert parted(examples, (0.0, 1.0), first) is examples
    assert seen((0.0, 0.75), first) == seen((0.0, 0.75), later)
    assert sorted(seen((0.0, 0.75), first) + seen((0.75, 1.0), later)) == list(range(11))
    assert seen((0.75, 1.0), first) != seen((0.75, 1.0), Clock(3, (1, "b")))
    assert len(parted(examples[:1], (0.75, 1.0), first)) == 1  # one row is in both


def test_steps_follow_epochs_accumulation_and_share(base: Base) -> None:
    kernel = Kernel(base, TASK, unclipped(batch_size=4, local_steps=None, local_epochs=2))
    assert kernel.steps(Step(Assembly()), 22) == 12
    assert kernel.steps(Step(Assembly(), epochs=1), 22) == 6
    kernel.options = unclipped(batch_size=4, accumulation=3, local_steps=None, local_epochs=2)
    assert kernel.steps(Step(Assembly()), 22) == 4
    kernel.options = unclipped(batch_size=4, local_steps=8)
    assert kernel.steps(Step(Assembly(), share=0.25), 22) == 2
    kernel.close()


def test_batches_cover_every_example_once_per_pass() -> None:
    batches = batch_order(10, 4, generator(0, "x"))
    first = [next(batches) for _ in range(3)]
    second = [next(batches) for _ in range(3)]
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(chain(*first)) == list(range(10)) == sorted(chain(*second))
    assert first != second


def test_folding_equals_the_side_path(base: Base, examples: Any) -> None:
    """Frozen modules written into the weights, as a side path, or as a frozen term: one function,
    one training.
    """
    frozen, own = start(base, 3, 1), start(base, 2, 2)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    kernel = Kernel(base, TASK, unclipped(lr=1e-2, local_steps=4, batch_size=4))
    assemblies = [
        Assembly((Term("own", own),), extras=head(base), folded=frozen),
        Assembly((Term("own", own),), extras=head(base), base_delta=frozen),
        Assembly((Term("own", own), Term("rest", frozen, train="")), extras=head(base)),
    ]
    logits = [kernel.logits(assembly, examples) for assembly in assemblies]
    trained = [
        kernel.train(Step(assembly), examples, CLOCK).adapter("own") for assembly in assemblies
    ]
    plain = kernel.logits(Assembly((Term("own", own),), extras=head(base)), examples)
    kernel.close()
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() < 1e-12
    assert (plain - logits[0]).abs().max() > 1e-6
    for name in base.sites:
        for adapter in trained[1:]:
            assert (adapter[name].B - trained[0][name].B).abs().max() < 1e-9
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_a_sub_network_leaves_layers_out(base: Base, examples: Any) -> None:
    """Without layer 0, the model is the one whose layer 0 passes its input through; nothing there
    trains.
    """
    own = start(base)
    kernel = Kernel(base, TASK, unclipped(lr=1e-2, local_steps=2, batch_size=4))
    part = Assembly((Term("own", own),), extras=head(base), layers=frozenset({1}))
    cut = kernel.logits(part, examples)
    whole = kernel.logits(Assembly((Term("own", own),), extras=head(base)), examples)
    trained = kernel.train(Step(part), examples, CLOCK).adapter("own")
    kernel.close()
    assert (cut - whole).abs().max() > 1e-6
    for name, site in base.sites.items():
        assert torch.equal(trained[name].B, own[name].B) == (site.layer == 0)
    layers = base.model.encoder.layer
    base.model.encoder.layer = nn.ModuleList([layers[1]])
    shifted = {n.replace("layer.1", "layer.0"): f for n, f in own.items() if "layer.1" in n}
    sites = {n.replace("layer.1", "layer.0"): s for n, s in base.sites.items() if "layer.1" in n}
    from dataclasses import replace

    alone = replace(base, sites={n: replace(s, name=n, layer=0) for n, s in sites.items()})
    small = Kernel(alone, TASK, unclipped())
    expected = small.logits(Assembly((Term("own", shifted),), extras=head(base)), examples)
    small.close()
    base.model.encoder.layer = layers
    assert (cut - expected).abs().max() < 1e-12
