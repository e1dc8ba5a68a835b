"""DoRA (``lora.dora``): the forward against its dense formula, and training against PEFT's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tests.tiny import sentences, unclipped
from torch import Tensor, nn

from fedgrove.adapters.adapter import Adapter, Dora, Factors, Site, factors_of, fresh
from fedgrove.adapters.assembly import Assembly, Extra, Term, as_one_adapter
from fedgrove.adapters.magnitude import Frozen, gains, magnified, row_norms
from fedgrove.adapters.private import is_private, seal, unseal
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base
from fedgrove.job.sections import TrainSection
from fedgrove.methods.contract import Step
from fedgrove.training.frozen import FrozenLayers
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.loop import Clock, batch_order

CLOCK = Clock(7, (1, "client"))
TASK = ClassifyText(labels=("negative", "positive"), max_length=32)


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


@pytest.fixture(scope="module")
def examples(base: Base) -> list[dict[str, Any]]:
    return TASK.encode(sentences(22, seed=1), base.processor)


def start(base: Base, seed: int = 0, size: float = 0.1) -> Adapter:
    """Neither B nor the change of a magnitude is zero, so that all get gradients at once."""
    norms = FrozenLayers(base).norms()
    draw = generator(seed, "rest")
    found: Adapter = {}
    for name, each in fresh(base.sites, 3, 0.7, generator(seed, "A"), dtype=torch.float64).items():
        B = size * torch.randn(each.B.shape, generator=draw, dtype=torch.float64)
        M = norms[name] * (
            1 + size * torch.randn(len(norms[name]), generator=draw, dtype=torch.float64)
        )
        found[name] = Dora(each.A, B, each.scale, M)
    return found


def head(base: Base) -> dict[str, Extra]:
    values = TASK.new_head(base.hidden, generator(3, "head"))
    return {f"head.{name}": Extra(value.double()) for name, value in values.items()}


def in_peft(folder: Path, adapter: Adapter) -> tuple[Any, dict[str, Any]]:
    """PEFT's own DoRA with the numbers of an adapter, and its layers by site."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(folder), dtype=torch.float64)
    config = LoraConfig(r=3, lora_alpha=1, target_modules=sorted(adapter), use_dora=True)
    peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    for module in peft.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A")
    }
    for name, each in adapter.items():
        layers[name].scaling["default"] = each.scale
        for letter, value in each.tensors.items():
            _parameter(layers[name], letter).data = value.clone()
    return peft, layers


def _parameter(layer: Any, letter: str) -> Tensor:
    kept = {"A": layer.lora_A, "B": layer.lora_B, "M": layer.lora_magnitude_vector}[letter]
    return kept["default"].weight


@pytest.mark.parametrize("bias", [True, False])
def test_the_forward_is_the_dense_formula(bias: bool) -> None:
    rng = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    # badly scaled rows, one of them zero
    W = draw(5, 4) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 2.0], dtype=torch.float64)[:, None]
    b = draw(5) if bias else None
    x = draw(2, 3, 4)
    dora = Dora(draw(2, 4), draw(5, 2), 0.7, draw(5).abs())
    whole = W + 0.7 * dora.B @ dora.A
    dense = dora.M / whole.norm(dim=1)
    layer = Frozen(W, row_norms(W), b)
    gain = gains(dora, layer)
    torch.testing.assert_close(gain, dense, rtol=1e-9, atol=0)
    found = magnified(dora, gain, b, x, nn.functional.linear(x, W, b))
    wanted = nn.functional.linear(x, dense[:, None] * whole, b)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_it_starts_as_the_base_bit_for_bit(base: Base, examples: list[Any]) -> None:
    kernel = Kernel(base, TASK, unclipped(batch_size=4))
    norms = FrozenLayers(base).norms()
    plain = fresh(base.sites, 3, 0.7, generator(0, "A"), dtype=torch.float64)
    adapter: Adapter = {}
    for name, each in plain.items():
        adapter[name] = Dora(each.A, each.B, each.scale, norms[name])
    term = Term("own", adapter, train="")
    with_it = kernel.logits(Assembly((term,), extras=head(base)), examples)
    assert torch.equal(with_it, kernel.logits(Assembly(extras=head(base)), examples))


@pytest.mark.parametrize(
    "options",
    [
        unclipped(lr=1e-2, weight_decay=0.1, batch_size=4, local_steps=7),
        unclipped(optimizer="sgd", lr=0.5, momentum=0.9, batch_size=5, local_steps=7),
        unclipped(lr=1e-2, clip=0.05, accumulation=2, batch_size=3, local_steps=5),
    ],
)
def test_training_is_peft_s(
    base: Base, tiny_bert: Path, examples: list[Any], options: TrainSection
) -> None:
    adapter = start(base)
    kernel = Kernel(base, TASK, options)
    trained = kernel.train(
        Step(Assembly((Term("own", adapter),), extras=head(base))), examples, CLOCK
    )

    peft, layers = in_peft(tiny_bert, adapter)
    own = {name: e.value.clone().requires_grad_() for name, e in head(base).items()}
    leaves = [p for p in peft.parameters() if p.requires_grad] + list(own.values())
    optimizer: torch.optim.Optimizer
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(leaves, lr=options.lr, momentum=options.momentum)
    else:
        optimizer = torch.optim.AdamW(leaves, lr=options.lr, weight_decay=options.weight_decay)
    order = generator(CLOCK.seed, *CLOCK.keys, "train", "order")
    batches = batch_order(len(examples), options.batch_size, order)
    for _ in range(options.local_steps or 0):
        optimizer.zero_grad()
        for _ in range(options.accumulation):
            batch = TASK.collate([examples[i] for i in next(batches)], base.pad_id)
            hidden = peft(**TASK.inputs(batch)).last_hidden_state
            weights = {name.removeprefix("head."): value for name, value in own.items()}
            logits = TASK.head_logits(TASK.pool(hidden, batch), weights)
            (TASK.loss(logits, batch) / options.accumulation).backward()
        if options.clip:
            nn.utils.clip_grad_norm_(leaves, options.clip)
        optimizer.step()

    for name, factors in trained.adapter("own").items():
        assert isinstance(factors, Dora)
        for letter, value in factors.tensors.items():
            wanted = _parameter(layers[name], letter)
            moved = (wanted - adapter[name].tensors[letter]).norm()
            assert moved > 1e-6
            assert (value - wanted).norm() < 1e-9 * moved, (name, letter)
    for name, wanted in own.items():
        torch.testing.assert_close(
            unseal(trained.extra(name)), wanted.detach(), rtol=1e-9, atol=1e-12
        )


def test_a_cohort_is_its_members_alone(base: Base, examples: list[Any]) -> None:
    options = unclipped(lr=1e-2, batch_size=3, local_steps=4)
    kernel = Kernel(base, TASK, options)
    works = []
    for seed, part in enumerate((examples[:8], examples[8:14], examples[14:])):
        assembly = Assembly((Term("own", start(base, seed)),), extras=head(base))
        works.append(Work(Step(assembly), part, Clock(7, (1, f"client-{seed}"))))
    assert all(kernel.joins(work) for work in works)
    together = kernel.train_together(works)
    for work, one in zip(works, together, strict=True):
        alone = kernel.work(work)
        for name, factors in alone.adapter("own").items():
            for letter, value in factors.tensors.items():
                found = one.adapter("own")[name].tensors[letter]
                torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-11)


def test_what_a_client_keeps_is_sealed_whole(base: Base, examples: list[Any]) -> None:
    kernel = Kernel(base, TASK, unclipped(batch_size=4, local_steps=1))
    adapter = {name: each.map(seal) for name, each in start(base).items()}
    step = Step(Assembly((Term("own", adapter, home="client"),), extras=head(base)))
    for factors in kernel.train(step, examples, CLOCK).adapter("own").values():
        assert [is_private(value) for value in factors.tensors.values()] == [True] * 3


def test_a_layer_that_holds_its_weights_turned() -> None:
    """GPT-2's Conv1D has W0 as [in, out]; its magnitudes are of outputs all the same."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2Model(config).double().eval()
    wanted = LoraConfig(
        r=2, lora_alpha=3, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True
    )
    peft = get_peft_model(model, wanted, autocast_adapter_dtype=False)
    adapted = [module for module in peft.modules() if hasattr(module, "lora_A")]
    layer: Any = adapted[0]
    layer.lora_B["default"].weight.data.normal_()
    layer.lora_magnitude_vector["default"].weight.data *= torch.linspace(0.5, 2, 96)
    sides = [_parameter(layer, letter).detach() for letter in "ABM"]
    dora = factors_of(sides, layer.scaling["default"])
    assert isinstance(dora, Dora)
    site = Site("c_attn", 0, 32, 96, transposed=True)
    holder = SimpleNamespace(
        model=SimpleNamespace(get_submodule=lambda name: layer.base_layer),
        adapter_dtype=torch.float64,
        sites={"c_attn": site},
    )
    frozen = FrozenLayers(cast(Base, holder)).at(site)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    found = magnified(dora, gains(dora, frozen), frozen.bias, x, layer.base_layer(x))
    torch.testing.assert_close(found, layer(x), rtol=1e-9, atol=1e-10)


def test_it_stands_alone(base: Base) -> None:
    adapter = start(base)
    plain = {name: Factors(each.A, each.B, each.scale) for name, each in adapter.items()}
    one = Term("one", adapter)
    with pytest.raises(AdapterError, match="nothing stands beside it, and here are"):
        Assembly((one, Term("two", plain)))
    with pytest.raises(AdapterError, match="nothing stands beside it"):
        Assembly((one,), base_delta=plain)
    whole = as_one_adapter(Assembly((one,)), base.sites)
    assert all(
        torch.equal(whole[name].tensors["M"], adapter[name].tensors["M"]) for name in adapter
    )
