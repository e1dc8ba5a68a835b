from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedgrove.ground.errors import JobError, ModelError
from fedgrove.interop import quantise
from fedgrove.job import Job


def test_plain_is_plain() -> None:
    assert quantise.options("none", "cpu", torch.float32) == {}


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_cpu_is_refused(bits: Any) -> None:
    with pytest.raises(
        ModelError, match=rf'model.quantize = "{bits}" needs a CUDA GPU, and the job runs on cpu'
    ):
        quantise.options(bits, "cpu", torch.float32)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        quantise, "find_spec", lambda package: None if package == "bitsandbytes" else object()
    )
    with pytest.raises(
        ModelError, match=r"needs bitsandbytes: pip install \"fedgrove\[quantize\]\""
    ):
        quantise.options("8bit", "cuda", torch.bfloat16)


def test_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(quantise, "find_spec", lambda package: object())
    made: list[dict[str, Any]] = []

    class Config:
        def __init__(self, **given: Any) -> None:
            made.append(given)

    monkeypatch.setattr(transformers, "BitsAndBytesConfig", Config)
    assert quantise.options("8bit", "cuda", torch.bfloat16)["device_map"] == {
        "": torch.device("cuda")
    }
    quantise.options("4bit", "cuda:1", torch.bfloat16)
    assert made[0] == {"load_in_8bit": True}
    assert made[1]["load_in_4bit"]
    assert made[1]["bnb_4bit_compute_dtype"] == torch.bfloat16


def test_nothing_is_folded_into_integers() -> None:
    quantise.foldable("q", nn.Linear(2, 2))
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"'q' is held in few bits .* method.folding = \"side\""):
        quantise.foldable("q", packed)


def test_a_stock_head_is_not_rounded() -> None:
    with pytest.raises(JobError, match=r'model.quantize = "8bit" would round the stock head'):
        Job.parse('[model]\nhead = "stock"\nquantize = "8bit"')
