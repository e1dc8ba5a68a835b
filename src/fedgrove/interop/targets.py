"""Which linear layers are adapted: ``"auto"`` (query and value of every attention layer, else what
PEFT's own table says), ``"all-linear"`` or patterns.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedgrove.adapters.adapter import Site
from fedgrove.ground.errors import ModelError

#: (query, value) as the architectures of transformers call them
_QUERY_VALUE = (
    ("query", "value"),  # BERT, RoBERTa, ViT, ELECTRA
    ("q_proj", "v_proj"),  # LLaMA, OPT, Qwen, Mistral, Gemma, CLIP
    ("q_lin", "v_lin"),  # DistilBERT
    ("query_proj", "value_proj"),  # DeBERTa-v2/v3
    ("q", "v"),  # T5
)
#: one matrix for query, key and value, which gets one adapter as a whole
_FUSED = ("c_attn", "query_key_value", "qkv", "qkv_proj", "Wqkv", "in_proj_qkv")

Targets = Literal["auto", "all-linear"] | Sequence[str]


def find_sites(model: nn.Module, targets: Targets) -> dict[str, Site]:
    """The adapted linears in the model's order. Raises ``ModelError`` where nothing fits."""
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if targets == "auto":
        chosen = _auto(model, linears)
    elif targets == "all-linear":
        chosen = _all(model, linears)
    else:
        chosen = _matching(model, linears, targets)
    numbers = layer_numbers(chosen)
    known = [number for number in numbers.values() if number is not None]
    above = (
        max(known) + 1 if known else 0
    )  # a linear outside the numbered layers counts as one more layer on top
    sites: dict[str, Site] = {}
    for name in chosen:
        number, (inputs, outputs) = numbers[name], _sides(linears[name])
        sites[name] = Site(
            name,
            above if number is None else number,
            inputs,
            outputs,
            transposed=isinstance(linears[name], Conv1D),
        )
    return sites


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _sides(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer; ``Conv1D`` of transformers holds its weight [in, out]."""
    if isinstance(linear, Conv1D):
        inputs, outputs = linear.weight.shape
        return int(inputs), int(outputs)
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def layer_index(name: str) -> int | None:
    """The transformer layer in a module path: its first number (``encoder.layer.3.attention...`` is
    layer 3).
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if found:
        return int(found.group(1))
    return None


def layer_numbers(names: Iterable[str]) -> dict[str, int | None]:
    """The transformer layer of each module path: ``layer_index``, numbered through where there are
    an encoder and a decoder, whose first layer comes after the encoder's last.
    """
    numbers = {name: layer_index(name) for name in names}
    encoders: list[int] = []
    for name, number in numbers.items():
        if number is not None and "encoder" in _stack(name):
            encoders.append(number)
    before = max(encoders, default=-1) + 1
    for name, number in numbers.items():
        if number is not None and "decoder" in _stack(name):
            numbers[name] = before + number
    return numbers


def _stack(name: str) -> list[str]:
    """The parts of a module path before its first number."""
    parts = name.split(".")
    return list(takewhile(lambda part: not part.isdigit(), parts))


def _auto(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    for query, value in _QUERY_VALUE:
        names = [
            name
            for name in linears
            if name.rsplit(".", 1)[-1] in (query, value) and _numbered(name)
        ]
        ends = {name.rsplit(".", 1)[-1] for name in names}
        if ends == {query, value}:
            return names
    for names in (_of_pefts_table(model, linears), _fused(linears)):
        if names:
            return names
    raise ModelError(
        f'lora.targets = "auto" found no query and value layers in {type(model).__name__}; '
        f"name the layers in lora.targets, such as {_suggestions(linears)}."
    )


def _of_pefts_table(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    """What PEFT adapts of a model of this type where it is told nothing."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    kind = getattr(getattr(model, "config", None), "model_type", "")
    wanted = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, ())
    if isinstance(wanted, str):
        return [name for name in linears if re.fullmatch(wanted, name)]
    ends = tuple(wanted)
    return [name for name in linears if _numbered(name) and name.rsplit(".", 1)[-1] in ends]


def _fused(linears: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in linears if _numbered(name) and name.rsplit(".", 1)[-1] in _FUSED]


def _all(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[str]:
    """Every linear of the numbered layers: neither embeddings nor poolers, heads and output
    layers.
    """
    names = [name for name in linears if _numbered(name)]
    if not names:
        raise ModelError(
            f'lora.targets = "all-linear" found no linear layer in {type(model).__name__}\'s '
            f"numbered layers; name the layers in lora.targets, such as {_suggestions(linears)}."
        )
    return names


def _numbered(name: str) -> bool:
    return layer_index(name) is not None


def _matching(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    patterns: Sequence[str],
) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {name for name in linears if _matches(name, pattern)}
        if not hits:
            others = [
                name for name, module in model.named_modules() if name and _matches(name, pattern)
            ]
            if others:
                kind = type(dict(model.named_modules())[others[0]]).__name__
            else:
                kind = ""
            if others:
                why = (
                    f"matches only {kind} modules, and only Linear and Conv1D layers can be adapted"
                )
            else:
                why = "matches no layer"
            raise ModelError(
                f"lora.targets: '{pattern}' {why} of {type(model).__name__}; "
                f"its linear layers end in {_suggestions(linears)}."
            )
        chosen |= hits
    return [name for name in linears if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


def _suggestions(linears: Mapping[str, nn.Module]) -> str:
    ends = sorted(
        {".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in linears}
    )
    return ", ".join(repr(end) for end in ends[:8]) or "(it has no linear layer)"
