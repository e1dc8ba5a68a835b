"""Which linear layers are adapted: ``"auto"`` (query and value of every attention layer) or
patterns.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Literal

from torch import nn

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
#: one matrix for query, key and value: adapting "query and value" alone is not possible there
_FUSED = ("c_attn", "query_key_value", "qkv", "qkv_proj", "Wqkv", "in_proj", "in_proj_qkv")


def find_sites(model: nn.Module, targets: Literal["auto"] | Sequence[str]) -> dict[str, Site]:
    """The adapted linears in the model's order. Raises ``ModelError`` where nothing fits."""
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    if targets == "auto":
        chosen = _auto(model, linears)
    else:
        chosen = _matching(model, linears, list(targets))
    numbers = {name: layer_index(name) for name in chosen}
    known = [number for number in numbers.values() if number is not None]
    above = (
        max(known) + 1 if known else 0
    )  # a linear outside the numbered layers counts as one more layer on top
    sites: dict[str, Site] = {}
    for name in chosen:
        number, linear = numbers[name], linears[name]
        sites[name] = Site(
            name, above if number is None else number, linear.in_features, linear.out_features
        )
    return sites


def layer_index(name: str) -> int | None:
    """The transformer layer in a module path: its first number (``encoder.layer.3.attention...`` is
    layer 3).
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if found:
        return int(found.group(1))
    return None


def _auto(model: nn.Module, linears: dict[str, nn.Linear]) -> list[str]:
    for query, value in _QUERY_VALUE:
        names = [
            name
            for name in linears
            if name.rsplit(".", 1)[-1] in (query, value) and layer_index(name) is not None
        ]
        ends = {name.rsplit(".", 1)[-1] for name in names}
        if ends == {query, value}:
            return names
    fused = sorted(
        {n.rsplit(".", 1)[-1] for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in _FUSED}
    )
    if fused:
        kinds = sorted(
            {type(m).__name__ for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in fused}
        )
        raise ModelError(
            f"{type(model).__name__} computes query, key and value in one layer "
            f"({', '.join(fused)}, a {'/'.join(kinds)}), "
            'so lora.targets = "auto" has no query and value to adapt; name other layers in '
            "lora.targets, such as "
            f"{_suggestions(linears)}."
        )
    raise ModelError(
        f'lora.targets = "auto" found no query and value layers in {type(model).__name__}; '
        f"name the layers in lora.targets, such as {_suggestions(linears)}."
    )


def _matching(model: nn.Module, linears: dict[str, nn.Linear], patterns: list[str]) -> list[str]:
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
                why = f"matches only {kind} modules, and only plain Linear layers can be adapted"
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


def _suggestions(linears: dict[str, nn.Linear]) -> str:
    ends = sorted(
        {".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in linears}
    )
    return ", ".join(repr(end) for end in ends[:8]) or "(it has no linear layer)"
