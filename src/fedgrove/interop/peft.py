"""PEFT adapter directories: the documented format in which a client leaves.

``adapter_config.json`` + ``adapter_model.safetensors`` are PEFT's own. Beside them
``head.safetensors`` (our pooled head) and ``fedgrove.json`` (labels, maximum length, pooling,
precision: what a classifier is besides its weights).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Dora, alpha_of, factors_of, scale_of
from fedgrove.federation.tasks import TASKS
from fedgrove.federation.tasks.base import Stock
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.files import whole_directory
from fedgrove.ground.plain import Given, Plain
from fedgrove.interop.copies import Copies, Origin, content_key, copy_beside
from fedgrove.interop.models import HeadKind

PREFIX = "base_model.model."
CONFIG, WEIGHTS, HEAD, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "head.safetensors",
    "fedgrove.json",
)
#: what PEFT calls the task of a model that writes, by how it is read
_WRITING = {"lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
#: what PEFT calls the tensors of a site, by letter
NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "M": "lora_magnitude_vector"}
GLOBAL = "_global"  # the common model's directory among the clients'


def save_adapter(
    folder: Path,
    adapter: Adapter,
    *,
    base: str,
    head: Mapping[str, Tensor],
    head_kind: HeadKind,
    head_modules: tuple[str, ...] = (),
    transposed: bool = False,
    card: Given,
    copies: Copies | None = None,
    rslora: bool = False,
) -> None:
    """Write one PEFT adapter directory, replacing what is there only when all of it is written.

    ``base`` is the name that PEFT loads the base by. With ``head_kind = "stock"`` the head goes
    where PEFT keeps ``modules_to_save``; else it is ``head.safetensors`` beside the adapter: weight
    [c, h] and bias [c], none for a language model.
    ``transposed``: whether the base has adapted layers that hold their weights so (``Site``).
    ``copies``: what was written of the same run, so that equal content is one file; its owner syncs.
    ``rslora`` says how PEFT is to read alpha; the scales are the factors' own.
    """
    if not adapter:
        raise AdapterError(f"{folder.name}: there is no LoRA term to write as an adapter.")
    with whole_directory(folder, synced=copies is None) as partial:
        stock = head_kind == "stock"
        kind = _task_type(card.get("task"), head_kind, head_modules)
        modules = head_modules if stock else ()
        tensors: dict[str, Tensor] = {}
        for site, factors in adapter.items():
            for letter, value in factors.tensors.items():
                tensors[f"{PREFIX}{site}.{NAMES[letter]}"] = value
        if stock:
            tensors |= {f"{PREFIX}{name}": value for name, value in head.items()}
        scales = [(site, factors.scale) for site, factors in adapter.items()]
        described = (base, modules, kind, rslora, scales)
        told = _store(tensors, partial, folder, WEIGHTS, card, copies, *described)
        if told is None:
            config = _config(adapter, base, modules, kind, rslora)
            config.fan_in_fan_out = transposed
            config.save_pretrained(str(partial))
        else:
            copy_beside(told.path, CONFIG, partial)
            card = {**card, "same_weights_as": told.client or GLOBAL}
        if head and not stock:
            _store(head, partial, folder, HEAD, card, copies)
        (partial / CARD).write_text(
            json.dumps(dict(card), indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )


def _task_type(
    task: str | None,
    head_kind: str,
    head_modules: tuple[str, ...],
) -> str | None:
    """What PEFT calls the task of a model with this kind of head."""
    if head_kind in _WRITING:
        return _WRITING[head_kind]
    whole = Stock()
    if task is not None:
        whole = TASKS.find(task).stock
    if whole.peft is None or (head_kind == "stock" and head_modules):
        return whole.peft
    return "FEATURE_EXTRACTION"


def _store(
    tensors: Mapping[str, Tensor],
    partial: Path,
    folder: Path,
    name: str,
    card: Given,
    copies: Copies | None,
    *described: object,
) -> Origin | None:
    """Write tensors [any shape] as the file ``name`` of what becomes ``folder``, or link it to the
    first of the same content, which is returned.
    """
    key = ""
    if copies is not None:
        key = content_key(tensors, name, *described)
        origin = copies.linked(key, partial / name)
        if origin is not None:
            return origin
    plain = {each: value.detach().clone().contiguous() for each, value in tensors.items()}
    save_file(plain, partial / name, metadata={"format": "pt"})
    if copies is not None:
        copies.keep(key, partial / name, folder / name, card.get("client"))
    return None


def rewrite(
    folder: Path,
    adapter: Adapter,
    head: Mapping[str, Tensor],
    config: Given,
    *,
    card: Given,
) -> None:
    """Write a directory of other factors with the head, tensors [any shape] by name, and the
    configuration of one that was read.
    """
    save_adapter(
        folder,
        adapter,
        base=str(config["base_model_name_or_path"]),
        head=head,
        head_kind=card["head"],
        head_modules=tuple(config.get("modules_to_save") or ()),
        transposed=bool(config.get("fan_in_fan_out")),
        card=card,
        rslora=bool(config.get("use_rslora")),
    )


def _config(
    adapter: Adapter,
    base: str,
    modules: tuple[str, ...],
    kind: str | None,
    rslora: bool,
) -> Any:
    from peft import LoraConfig

    ranks = {site: factors.rank for site, factors in adapter.items()}
    alphas = {site: alpha_of(f.scale, f.rank, rslora) for site, f in adapter.items()}
    rank = max(ranks.values())
    alpha = next(alphas[site] for site in adapter if ranks[site] == rank)
    config: Any = LoraConfig(
        r=rank,
        lora_alpha=_tidy(alpha),
        target_modules=sorted(adapter),
        rank_pattern={site: r for site, r in ranks.items() if r != rank},
        alpha_pattern={site: _tidy(a) for site, a in alphas.items() if a != alpha},
        task_type=kind,
        modules_to_save=list(modules) or None,
        base_model_name_or_path=base,
        inference_mode=True,
        use_rslora=rslora,
        use_dora=any(isinstance(factors, Dora) for factors in adapter.values()),
    )
    config.target_modules = sorted(
        config.target_modules
    )  # a set inside PEFT: its order would differ between processes
    return config


def _tidy(alpha: float) -> Any:
    """PEFT declares alpha an int; a whole number is written as one."""
    if alpha == int(alpha):
        return int(alpha)
    return alpha


def read_adapter(
    folder: Path,
    *,
    dora: bool = False,
) -> tuple[Adapter, dict[str, Tensor], Plain]:
    """(adapter, head, PEFT's configuration) of a directory, whoever wrote it; of DoRA where it is
    asked for (``dora``).

    Tensors [any shape] other than LoRA's pairs (modules to save) come back as the head, by their
    name in the base model. Raises ``AdapterError`` in one sentence that names the file and the tensor.
    """
    config = read_json(folder / CONFIG)
    if (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS).exists():
        raise AdapterError(
            f"{folder} holds pickled weights (adapter_model.bin); save the adapter as safetensors."
        )
    tensors = read_tensors(folder / WEIGHTS)
    if config.get("use_dora") and not dora:
        raise AdapterError(
            f"{folder / CONFIG} has use_dora = true, and this is for plain LoRA adapters; merge it "
            f"(--merge) where a whole model will do."
        )
    letters = "AB"
    if config.get("use_dora"):
        letters = "ABM"
    pairs: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise AdapterError(
                f"{folder / WEIGHTS}: the tensor '{name}' has values that are not finite."
            )
        path = name.removeprefix(PREFIX)
        for letter in letters:
            ending = f".{NAMES[letter]}"
            if path.endswith(ending):
                pairs.setdefault(path.removesuffix(ending), {})[letter] = value
                break
        else:
            head[path] = value
    adapter: Adapter = {}
    for site, pair in sorted(pairs.items()):
        missing = [letter for letter in letters if letter not in pair]
        if missing:
            raise AdapterError(
                f"{folder / WEIGHTS}: '{site}' has no {NAMES[missing[0]]}; a part of the update is "
                f"missing."
            )
        if pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = f"A {tuple(pair['A'].shape)}, B {tuple(pair['B'].shape)}"
            raise AdapterError(
                f"{folder / WEIGHTS}: '{site}' has shapes that do not fit: {shapes}."
            )
        if "M" in pair and pair["M"].shape != pair["B"].shape[:1]:
            raise AdapterError(
                f"{folder / WEIGHTS}: '{site}' has a magnitude of the shape "
                f"{tuple(pair['M'].shape)} for {pair['B'].shape[0]} outputs."
            )
        sides = [pair[letter] for letter in letters]
        adapter[site] = factors_of(sides, _scale(config, site, pair["A"].shape[0]))
    if (folder / HEAD).exists():
        head |= read_tensors(folder / HEAD)
    return adapter, head, config


def _scale(
    config: Given,
    site: str,
    rank: int,
) -> float:
    import re

    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            alpha = value
            break
    return scale_of(float(alpha), rank, bool(config.get("use_rslora")))


def read_json(path: Path) -> Plain:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{path} does not exist; {path.parent} is not an adapter directory."
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} does not hold a JSON object.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors [any shape] of a safetensors file, by name. Raises ``AdapterError``."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}
    except FileNotFoundError:
        raise AdapterError(f"{path} does not exist.") from None
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{path} is not a whole safetensors file ({error}); it was cut short or altered."
        ) from error
