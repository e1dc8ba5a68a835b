"""Whether an adapter's sites are layers of its base model, where that lies on this machine.

PEFT loads factors of a layer that the model does not have without an error, and they do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedgrove.aggregate.inputs import Source
from fedgrove.ground.errors import AdapterError

#: The class that PEFT's tasks are loaded with. Without a task any of them may be meant.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def check_layers(source: Source, base: str) -> None:
    """Refuse a site that no layer of the base is called by.

    Passes where ``base`` is no directory here, or of an architecture that is not known here: a
    round of aggregation needs no base model.
    """
    if not (Path(base) / "config.json").is_file():
        return
    task = source.config.get("task_type")
    closest = ""
    for layers in _models(base, task):
        unknown = [site for site in source.places if site not in layers]
        if not unknown:
            return
        closest = _refusal(source, base, unknown[0], layers)
    if closest:
        raise AdapterError(closest)


def _models(base: str, task: object) -> Iterator[set[str]]:
    """The names of the layers of each model that the task may mean, without its weights."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError):
        return
    own = getattr(config, "architectures", None) or []
    kinds = [_CLASSES.get(str(task)), *own]
    if str(task) not in _CLASSES:
        kinds = ["AutoModelForImageClassification", *_CLASSES.values(), *own]
    for kind in kinds:
        model = _empty(getattr(transformers, str(kind), None), config)
        if model is not None:
            yield {name for name, _ in model.named_modules()}


def _empty(kind: Any, config: Any) -> torch.nn.Module | None:
    """A model on the meta device; None where the class does not know such a configuration."""
    make = getattr(kind, "from_config", None) or getattr(kind, "_from_config", None)
    if make is None:
        return None
    try:
        with torch.device("meta"):
            model: torch.nn.Module = make(config)
    except (ValueError, TypeError, AttributeError, ImportError, NotImplementedError):
        return None
    return model


def _refusal(source: Source, base: str, site: str, layers: set[str]) -> str:
    likely = _likely(site, sorted(layers))
    if likely:
        why = f"there it is '{likely}': the adapter was saved of another class or wrapper"
    else:
        why = "it was trained on another model, or saved inside a wrapper"
    name = source.places[site].A
    return (
        f"{source.file}: '{name}' is of no layer of {base}, so that PEFT would load it to no "
        f"effect; {why}. Save it of the plain model."
    )


def _likely(site: str, layers: Sequence[str]) -> str:
    """The layer whose name has most of its last parts in common with the site's, at least two."""
    parts = site.split(".")
    for start in range(len(parts) - 1):
        ending = ".".join(parts[start:])
        for layer in layers:
            if f".{layer}".endswith(f".{ending}"):
                return layer
    return ""
