"""Adapter directories without our card: what PEFT, ``fedgrove aggregate`` or anybody else wrote.

What our card says of a model is found in PEFT's configuration and in the base's: the task, its
labels, the kind of head. A head is the adapter's own (``modules_to_save``, ``head.safetensors``) or
the base's; where there is none, the model can be merged and exported, and says so when it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.aggregate.inputs import Source, open_source
from fedgrove.federation.tasks import TASKS
from fedgrove.ground.errors import AdapterError, ModelError
from fedgrove.ground.plain import Plain
from fedgrove.interop import peft
from fedgrove.interop.models import EMBEDDED_MODELS, head_kind, load_config, longest_input

LONGEST = 128  # tokens of a text, where nothing says how many


@dataclass(frozen=True, eq=False)
class Opened:
    """An adapter directory that was read: ``head`` by the names of its tensors in the base, or of
    our own head; ``card`` as our own directories have it.
    """

    adapter: Adapter
    head: dict[str, Tensor]
    card: Plain


@contextmanager
def says_which(folder: Path) -> Iterator[None]:
    """Errors of a base that cannot be loaded name the adapter, and the option that helps."""
    try:
        yield
    except ModelError as error:
        if not str(error).startswith("model.name: "):
            raise
        why = str(error).removeprefix("model.name: ")
        raise ModelError(
            f"The base model of {folder}: {why} Where it lies elsewhere, say so (base=..., --base)."
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds one adapter, or one model that an adapter was merged into."""
    return (folder / peft.CONFIG).is_file() or (folder / peft.CARD).is_file()


def opened(folder: Path, labels: Sequence[str] | None = None, base: str | None = None) -> Opened:
    """A directory of PEFT's, with our card or without.

    ``labels`` in the order of the head's outputs, and ``base``, where the base lies, win over what
    the files say. Raises ``AdapterError`` for what cannot be understood.
    """
    if (folder / peft.CARD).exists():
        given = peft.read_json(folder / peft.CARD)
    else:
        given = {}
    if given.get("head"):  # a directory of a run, whole
        adapter, head, _ = peft.read_adapter(folder, dora=True)
        card = given
    else:
        source = open_source(folder, folder.name)
        adapter = {site: _single(source.read(site)) for site in source.places}
        head = {_head_name(name): source.saved(name).float() for name in source.others}
        card = _described(source, head, base) | given
        card["head"] = _head_kind(card["task"], head, card)
        if TASKS.find(card["task"]).writes:
            head = _without_copies(folder, head)
        if card["head"] == "pooled":
            config = load_config(card["model"], card["revision"])
            adapter = {_bare(site, config): factors for site, factors in adapter.items()}
    return Opened(adapter, head, _renamed(folder, card, labels, base))


def _renamed(folder: Path, card: Plain, labels: Sequence[str] | None, base: str | None) -> Plain:
    """The card with what the user says better. Raises ``AdapterError`` for labels that do not fit."""
    if base is not None and not card.get("merged"):  # a merged model is its own base
        card = {**card, "model": base, "revision": None}
    if labels is not None:
        _check_labels(folder, card, labels)
        card = {**card, "labels": list(labels)}
    return card


def card_of(folder: Path, labels: Sequence[str] | None = None, base: str | None = None) -> Plain:
    """What a directory says of its model, as our card does; ``labels`` and ``base`` win."""
    if (folder / peft.CARD).exists():
        given = peft.read_json(folder / peft.CARD)
        if given.get("head"):
            return _renamed(folder, given, labels, base)
    return opened(folder, labels, base).card


def tidied(source: Path, out: Path, base: str | None = None) -> Path:
    """The directory written anew as ours are: names that PEFT matches, one scale, a whole card."""
    found = opened(source, base=base)
    modules = _modules(peft.read_json(source / peft.CONFIG), found.head)
    peft.save_adapter(
        out,
        found.adapter,
        base=EMBEDDED_MODELS.get(str(found.card["model"]), str(found.card["model"])),
        head=found.head,
        head_kind=found.card["head"],
        head_modules=modules if found.card["head"] == "stock" else (),
        transposed=bool(peft.read_json(source / peft.CONFIG).get("fan_in_fan_out")),
        card=found.card,
    )
    return out


def _modules(config: Mapping[str, Any], head: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The modules of a head, by the names that the configuration has for them, else by their own.

    ``head``: its tensors [any shape], by their names in the base.
    """
    named = config.get("modules_to_save") or ()
    found: dict[str, None] = {}
    for name in head:
        path = name.split(".")[:-1]
        kept = [
            n for n in range(1, len(path)) if path[n - 1] in named or ".".join(path[:n]) in named
        ]
        found[".".join(path[: min(kept, default=len(path))])] = None
    return tuple(found)


def _described(source: Source, head: Mapping[str, Tensor], base: str | None) -> Plain:
    """What can be said of an adapter without a card; ``head``: its tensors [any shape] by name."""
    name = base or source.config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(
            f"{source.folder / peft.CONFIG} names no base model (base_model_name_or_path); give "
            "load(..., base=...) or --base."
        )
    if base:
        revision = None
    else:
        revision = source.config.get("revision")
    with says_which(source.folder):
        config = load_config(str(name), revision)
    task = _task(source, config)
    limit = longest_input(config)
    if task == "classify-images":
        length = {}
    else:
        length = {"max_length": min(LONGEST, limit or LONGEST)}
    return {
        "format": 1,
        "task": task,
        "labels": _labels(config, head) if TASKS.find(task).classifies else [],
        **length,
        "model": str(name),
        "revision": revision,
        "dtype": "float32",
        "method": None,
        "client": source.name,
    }


def _task(source: Source, config: Any) -> str:
    kind = source.config.get("task_type")
    if kind == "TOKEN_CLS":
        raise AdapterError(
            f"{source.folder / peft.CONFIG}: task_type is {kind!r}, and nothing says which tags its "
            "outputs are; one that was trained here has that in its fedgrove.json, any other loads "
            "with AutoPeftModelForTokenClassification."
        )
    if kind == "QUESTION_ANS":
        return "spans"
    if hasattr(config, "num_channels") or hasattr(config, "image_size"):
        return "classify-images"
    writes = kind in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or (
        kind is None and _is_a(config, "ForCausalLM", "LMHeadModel")
    )
    if writes:
        return "generate"
    return "classify-text"


def _labels(config: Any, head: Mapping[str, Tensor]) -> list[str]:
    """The names that the base's configuration has; ``LABEL_0`` and so on where they are not as many
    as the head's outputs, [] where there is no head.
    """
    named = [str(config.id2label[index]) for index in sorted(config.id2label)]
    if not head:
        if _is_a(config, "Classification"):
            return named
        return []
    outputs = min(value.shape[0] for value in head.values() if value.ndim)
    if len(named) == outputs:
        return named
    return [f"LABEL_{index}" for index in range(outputs)]


def _head_kind(task: str, head: Mapping[str, Tensor], card: Mapping[str, Any]) -> str:
    """As ``Base.head``: our own head has two tensors, weight [c, h] and bias [c], any other is the
    base's.
    """
    if task == "generate":
        return head_kind(load_config(card["model"], card["revision"]), "lm")
    ours = not head or set(head) == {"weight", "bias"}
    if ours and (head or not card["labels"]):
        return "pooled"
    return "stock"


def _without_copies(folder: Path, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Nothing: what PEFT keeps beside a language model's factors is a copy of frozen layers [any
    shape]. Raises ``AdapterError`` for whole modules that were trained.
    """
    trained = [name for name in head if ".base_layer." not in name]
    if trained:
        raise AdapterError(
            f"{folder} has whole trained modules beside its LoRA ({', '.join(trained[:3])}), which "
            "are not read for a language model; merge it with PEFT (merge_and_unload) and name the "
            "merged model."
        )
    return {}


def _check_labels(folder: Path, card: Mapping[str, Any], labels: Sequence[str]) -> None:
    known = len(card["labels"])
    if len(set(labels)) != len(labels) or (known and len(labels) != known):
        raise AdapterError(
            f"{folder}: its head has {known} outputs; give {known} different labels, in their order."
        )


def _is_a(config: Any, *endings: str) -> bool:
    kinds = getattr(config, "architectures", None) or []
    return any(str(kind).endswith(endings) for kind in kinds)


def _head_name(name: str) -> str:
    """Without the wrapper of PEFT's ``modules_to_save``, which some versions write."""
    plain = name.removeprefix(f"{peft.HEAD}/")
    for wrapper in (".modules_to_save.default.", ".modules_to_save."):
        plain = plain.replace(wrapper, ".")
    return plain


def _single(factors: Factors) -> Factors:
    return factors.map(lambda tensor: tensor.float())


def _bare(site: str, config: Any) -> str:
    """A site of a whole classifier by its name in the encoder alone."""
    from transformers import AutoModel

    kind = AutoModel._model_mapping.get(type(config), None)
    prefix = getattr(kind, "base_model_prefix", "")
    if prefix:
        return site.removeprefix(f"{prefix}.")
    return site
