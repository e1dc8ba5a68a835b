"""The base under hooks is as it was, whatever an assembly did to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop import zoo
from tests.tiny import save_vit, sentences, unclipped
from tests.training.test_kernel import CLOCK, TASK, head, start
from torch import nn

from fedgrove.adapters import Assembly, Term
from fedgrove.interop.models import Base, load_base
from fedgrove.methods.contract import Step
from fedgrove.training.hooked import LeftOut, layer_names, without_layers
from fedgrove.training.kernel import Halted, Kernel, Work
from fedgrove.training.packed import NAME
from fedgrove.training.rows import rows_first


@pytest.fixture
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


def state(base: Base) -> tuple[Any, ...]:
    """What an assembly might have changed: the modules, their own methods, weights, attention."""
    modules = [(name, id(module)) for name, module in base.model.named_modules()]
    replaced = [name for name, m in base.model.named_modules() if "forward" in vars(m)]
    weights = [(name, id(p), p.data_ptr()) for name, p in base.model.named_parameters()]
    return modules, replaced, weights, base.model.config._attn_implementation


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["plain", "layers", "folded"])
def test_the_base_is_as_it_was_after_training(
    kind: str, fails: bool, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(base)
    assert before[1] == [], "no module has a method of its own"
    options: dict[str, Any] = {}
    if kind == "layers":
        options["layers"] = frozenset({1})
    if kind == "folded":
        options["folded"] = start(base, 2, 7)
    assembly = Assembly((Term("own", start(base)),), extras=head(base), **options)
    examples = TASK.encode(sentences(9, seed=1), base.processor)
    kernel = Kernel(base, TASK, unclipped(batch_size=3, local_steps=2))
    seen: list[tuple[Any, ...]] = []
    read = kernel.reader.losses

    def reading(*args: Any) -> Any:
        seen.append(state(base))
        if fails:
            kernel.halt.set()
        return read(*args)

    monkeypatch.setattr(kernel.reader, "losses", reading)
    if fails:
        with pytest.raises(Halted):
            kernel.train(Step(assembly), examples, CLOCK)
    else:
        kernel.train(Step(assembly), examples, CLOCK)
    kernel.close()
    assert all(each[3] == NAME for each in seen), "batches of mixed lengths run packed"
    assert all((each[0] != before[0]) == (kind == "layers") for each in seen)
    assert all((each[2] != before[2]) == (kind != "plain") for each in seen)
    assert all(each[1] == [] for each in seen), "no method is replaced"
    assert state(base) == before


def test_a_layer_that_is_left_out_answers_what_a_model_asks_it() -> None:
    class Layer(nn.Module):
        attention_type = "full_attention"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """[any] -> the same and one."""
            return x + 1

    layer = LeftOut(Layer())
    assert layer.attention_type == "full_attention"
    states = torch.ones(2, 3, 4)
    assert torch.equal(layer(states, "mask", cache=None), states)
    assert torch.equal(layer(hidden_states=states), states)
    assert not list(layer.parameters())


def test_layers_of_any_model_are_found_and_left_out(tmp_path: Path, tiny_llama: Path) -> None:
    vit = load_base(str(save_vit(tmp_path / "vit")), task="classify-images")
    llama = load_base(str(tiny_llama), task="generate", head="lm")
    pixels = torch.zeros(1, 3, vit.model.config.image_size, vit.model.config.image_size)
    inputs = {"vit": {"pixel_values": pixels}, "llama": {"input_ids": torch.tensor([[3, 4, 5]])}}
    for base, name in ((vit, "vit"), (llama, "llama")):
        names = layer_names(base)
        assert sorted(names) == list(base.layers)
        calls: list[str] = []
        hooks = [
            base.model.get_submodule(path).register_forward_hook(
                lambda m, a, out, path=path, calls=calls: calls.append(path)
            )
            for path in names.values()
        ]
        with torch.inference_mode(), without_layers(base, frozenset({1})):
            base.model(**inputs[name])
        assert calls == [names[1]]
        for hook in hooks:
            hook.remove()


def test_a_base_that_puts_tokens_first_has_no_cohorts(tmp_path: Path) -> None:
    """Longformer's attention sees ``[tokens, rows, in]``: whose a token is, a cohort could not
    tell, and where there are as many tokens as rows it would not even notice.
    """
    folder = zoo.save("longformer", tmp_path / "longformer")
    kernel = Kernel(load_base(str(folder), dtype=torch.float64), TASK, unclipped())
    examples = TASK.encode(sentences(4, seed=0), kernel.base.processor)
    work = Work(Step(Assembly((Term("own", start(kernel.base)),))), examples, CLOCK)
    assert not kernel.hooked.joins
    assert not kernel.joins(work)


def test_a_base_of_rows_has_cohorts(base: Base) -> None:
    before = state(base)
    assert rows_first(base)
    assert state(base) == before
    names = list(base.sites)
    assert not any(base.model.get_submodule(name)._forward_pre_hooks for name in names)
