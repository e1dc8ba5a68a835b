"""Batches without padding give what padded ones give, and models that cannot run them are found
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import sentences, unclipped

from fedgrove.adapters import Assembly, Convex, Extra, Factors, Term, fresh
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import first_position, load_base
from fedgrove.methods.contract import Step
from fedgrove.training.kernel import Kernel
from fedgrove.training.loop import Clock
from fedgrove.training.packed import NAME, Layout, packs

TASK = ClassifyText(labels=("negative", "positive"), max_length=32)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 90,
}


def model(kind: str, causal: bool = False, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SMALL, "max_position_embeddings": 64, **more})
    torch.manual_seed(0)
    built = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
    return built.double().eval()


MODELS = {
    "bert": lambda: model("bert"),
    "roberta": lambda: model("roberta", pad_token_id=1),
    "llama, grouped queries": lambda: model("llama", causal=True, num_key_value_heads=2),
    "gpt2": lambda: model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@contextmanager
def attending(built: Any) -> Iterator[None]:
    """Inside, the model attends as packed rows want it."""
    before = built.config._attn_implementation
    built.set_attn_implementation(NAME)
    yield
    built.set_attn_implementation(before)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_equals_the_padded_batch(name: str) -> None:
    built = MODELS[name]()
    assert packs(built)
    mask = (torch.arange(9) < torch.tensor([[4], [9], [2]])).long()
    ids = torch.randint(3, 90, (3, 9), generator=generator(0, "ids")) * mask + (1 - mask)
    layout = Layout.of(mask)
    assert layout is not None
    assert layout.lengths == (4, 9, 2)
    padded = built(input_ids=ids, attention_mask=mask)[0]
    with attending(built):
        packed = built(**layout.inputs({"input_ids": ids}, first_position(built.config)))[0]
    assert packed.shape[:2] == (1, 16), "15 tokens, and one to a round number"
    assert torch.allclose(layout.unpack(packed), padded * mask[..., None], atol=1e-10)
    assert torch.equal(layout.pack(layout.unpack(packed))[:, :15], packed[:, :15])
    assert built.config._attn_implementation != NAME, "packs() leaves the model as it was"


@pytest.mark.parametrize("name", MODELS)
def test_texts_of_many_lengths_are_attended_in_groups_to_the_same_states_and_gradients(
    name: str,
) -> None:
    built = MODELS[name]()
    assert packs(built)
    lengths = torch.tensor([[3 + (7 * row) % 48] for row in range(41)])
    mask = (torch.arange(int(lengths.max())) < lengths).long()
    layout = Layout.of(mask)
    assert layout is not None
    assert len(layout.groups) >= 3, "one group would show nothing"
    assert all(len(group.lengths) == 8 for group in layout.groups[:-1])
    assert sorted(length for group in layout.groups for length in group.lengths) == sorted(
        layout.lengths
    )
    squares = sum(len(group.lengths) * group.longest**2 for group in layout.groups)
    assert squares < 0.7 * len(layout.lengths) * layout.longest**2
    words = built.get_input_embeddings()(
        torch.randint(3, 90, mask.shape, generator=generator(1, "ids"))
    )
    words = words.detach()

    def slope(out: torch.Tensor) -> None:
        (
            out * torch.randn(out.shape, dtype=out.dtype, generator=generator(2, "direction"))
        ).sum().backward()

    found = []
    for packing in (False, True):
        states = words.clone().requires_grad_()
        if packing:
            with attending(built):
                inputs = layout.inputs({"input_ids": mask}, first_position(built.config))
                del inputs["input_ids"]
                out = layout.unpack(built(inputs_embeds=layout.pack(states), **inputs)[0])
                slope(out)
        else:
            places = (torch.arange(mask.shape[1]) + first_position(built.config))[None].expand_as(
                mask
            )
            out = (
                built(inputs_embeds=states, attention_mask=mask, position_ids=places)[0]
                * mask[..., None]
            )
            slope(out)
        found.append((out.detach(), states.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-10)
    assert float(found[0][1].norm()) > 1e-3
    assert torch.allclose(found[0][1], found[1][1], atol=1e-10)


@pytest.mark.parametrize("lengths", [(8, 16, 8), (8, 9), (64,) * 7 + (56,) + (1,)], ids=str)
def test_there_is_a_spare_token_whatever_the_lengths_and_no_gradient_comes_to_it(
    lengths: tuple[int, ...],
) -> None:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    layout = Layout.of(mask)
    assert layout is not None
    real = sum(lengths)
    assert layout.spare >= 1
    assert (real + layout.spare) % 8 == 0
    rows = torch.randn(
        1, 2, real + layout.spare, 3, dtype=torch.float64, generator=generator(0, "rows")
    ).requires_grad_()
    parts = layout.apart(rows)
    for group, part in zip(layout.groups, parts, strict=True):
        assert part.shape == (len(group.lengths), 2, group.longest, 3)
    joined = layout.join([part * 2 for part in parts])
    assert torch.equal(joined[:, :real], 2 * rows.transpose(1, 2)[:, :real])
    direction = torch.randn(joined.shape, dtype=torch.float64, generator=generator(1, "direction"))
    direction[:, real:] = 0  # as in a model, where nobody looks at what spare tokens become
    (joined * direction).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad.transpose(1, 2)[:, :real], 2 * direction[:, :real])
    assert not rows.grad[:, :, real:].any()


@pytest.mark.parametrize(
    "built",
    [lambda: model("mistral", sliding_window=4), lambda: model("mpnet")],
    ids=["a window over the texts", "positions in its attention"],
)
def test_a_model_that_cannot_run_packed_rows_is_found_out(built: Any) -> None:
    assert not packs(built())


def test_no_layout_without_padding_or_with_padding_on_the_left() -> None:
    assert Layout.of(torch.ones(2, 5, dtype=torch.long)) is None
    assert Layout.of(torch.tensor([[0, 1, 1], [1, 1, 1]])) is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_and_evaluation_are_the_same_with_and_without_padding(
    tiny_bert: Path, checkpointing: bool
) -> None:
    base = load_base(str(tiny_bert), dtype=torch.float64, gradient_checkpointing=checkpointing)
    examples = TASK.encode(sentences(22, seed=1), base.processor)
    draw = generator(0, "B")
    start = {
        name: Factors(
            f.A, 0.1 * torch.randn(f.B.shape, generator=draw, dtype=torch.float64), f.scale
        )
        for name, f in fresh(
            base.sites, 3, 0.7, generator(0, "adapter"), dtype=torch.float64
        ).items()
    }
    head = {
        f"head.{n}": Extra(v.double())
        for n, v in TASK.new_head(base.hidden, generator(3, "head")).items()
    }
    gates = {
        f"lambda.{layer}": Extra(torch.tensor(0.3, dtype=torch.float64)) for layer in base.layers
    }
    terms = (Term("one", start), Term("two", start, train=""))
    step = Step(Assembly(terms, mix=Convex("one", "two"), extras=head | gates))
    kernel = Kernel(base, TASK, unclipped(lr=1e-2, batch_size=4, local_steps=5, clip=0.1))
    widths: list[int] = []
    base.model.embeddings.register_forward_hook(
        lambda module, args, out: widths.append(out.shape[0])
    )
    try:
        packed = kernel.train(step, examples, Clock(7, (1, "client")))
        assert 1 in widths, "no batch ran as one row"
        scores = kernel.evaluate(packed.assembly, examples)
        features = kernel.features(examples)
        kernel.hooked.packs = False
        padded = kernel.train(step, examples, Clock(7, (1, "client")))
        assert kernel.evaluate(padded.assembly, examples)["loss"] == pytest.approx(
            scores["loss"], abs=1e-10
        )
        assert torch.allclose(kernel.features(examples), features, atol=1e-10)
    finally:
        kernel.close()
    for name in start:
        for letter in "AB":
            ours, theirs = (
                getattr(packed.adapter("one")[name], letter),
                getattr(padded.adapter("one")[name], letter),
            )
            moved = (theirs - getattr(start[name], letter)).norm()
            assert moved > 1e-4
            assert (ours - theirs).norm() <= 1e-9 * moved


def test_the_second_text_of_a_pair_stays_one(tiny_bert: Path) -> None:
    """BERT adds a vector of its own to each token of a second text, packed or padded."""
    base = load_base(str(tiny_bert), dtype=torch.float64)
    rows = [{"text": "the good day", "pair": "it was " + "very " * count} for count in range(4)]
    examples = TASK.encode(rows, base.processor)
    kernel = Kernel(base, TASK, unclipped())
    found = kernel.features(examples)
    assert kernel.hooked.packs
    kernel.hooked.packs = False
    assert torch.allclose(found, kernel.features(examples), atol=1e-12)
    for example in examples:
        del example["token_type_ids"]
    assert not torch.allclose(found, kernel.features(examples), atol=1e-3)
    kernel.close()
