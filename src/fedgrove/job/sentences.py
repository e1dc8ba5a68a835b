"""From pydantic's errors to sentences that name the key, the value and what would be right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from pydantic import BaseModel, ValidationError

from fedgrove.ground.errors import JobError
from fedgrove.ground.plain import Given
from fedgrove.job.kinds import choices, field_kind, join, nearest
from fedgrove.job.sections import MethodSection, OptionsError, Section
from fedgrove.job.toml import key_text, shown, value_text

MOST = 5  # more mistakes than this are counted, not listed

#: Names that other tools use, which are too unlike ours for a spelling check.
ELSEWHERE = {
    "learning_rate": "train.lr",
    "epochs": "train.local_epochs",
    "num_epochs": "train.local_epochs",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "use_rslora": "lora.rslora",
    "use_dora": "lora.dora",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "max_grad_norm": "train.clip",
    "participation": "federation.fraction",
    "output_dir": "run.out",
    "algorithm": "method.name",
    "strategy": "method.name",
    "dataset": "data.name",
    "resume_from_adapter": "model.adapter",
    "early_stopping_patience": "run.patience",
    "load_best_model_at_end": "run.keep",
}


def job_error(
    error: ValidationError,
    root: type[BaseModel],
    values: Given,
    where: str,
    what: str = "the job",
) -> JobError:
    """All mistakes of a job, each one sentence on its own line; ``where`` is the file, or empty;
    ``what`` it holds.
    """
    # pydantic complains once for each member of a union, but the sentence that says them all is the
    # same
    sentences = list(dict.fromkeys(_sentences(error, root, (), values, root)))
    if where:
        prefix = f"{where}: "
    else:
        prefix = ""
    if len(sentences) == 1:
        return JobError(prefix + sentences[0])
    lines = [f"  {sentence}" for sentence in sentences[:MOST]]
    if len(sentences) > MOST:
        lines.append(f"  ... and {len(sentences) - MOST} more.")
    return JobError("\n".join([f"{prefix}{what} has {len(sentences)} mistakes:", *lines]))


def _sentences(
    error: ValidationError,
    model: type[BaseModel],
    prefix: tuple[str, ...],
    values: Any,
    root: type[BaseModel],
) -> Iterator[str]:
    for item in error.errors(include_url=False):
        carried = item.get("ctx", {}).get("error")
        if isinstance(carried, OptionsError):
            if isinstance(values, Mapping):
                own = values.get("method", {})
            else:
                own = {}
            yield from _sentences(carried.error, carried.options, ("method",), own, root)
            continue
        path, owner = _locate(model, item["loc"], values)
        key = ".".join(map(key_text, (*prefix, *path)))
        value = _lookup(values, path, item["input"])
        if item["type"] == "extra_forbidden":
            yield _unknown((*prefix, *path), value, owner, root)
        elif item["type"] in ("value_error", "assertion_error"):
            yield _own_words(key, path, owner, value, str(carried))
        else:
            yield _wrong(key, path, owner, value, item["type"])


def _locate(
    model: type[BaseModel],
    loc: tuple[int | str, ...],
    values: Any,
) -> tuple[tuple[str, ...], type[BaseModel]]:
    """The key's path down the sections, without pydantic's union tags and indices; and the section
    that holds it, of the kind that the values choose.
    """
    path: list[str] = []
    for part in loc:
        path.append(str(part))
        field = model.model_fields.get(str(part))
        if field:
            inner = field.annotation
        else:
            inner = None
        if len(path) == len(loc) or not _is_section(inner):
            break
        model = _of_these_values(inner, _lookup(values, tuple(path), None))
    return tuple(path), model


def _of_these_values(section: type[BaseModel], values: Any) -> type[BaseModel]:
    if issubclass(section, Section) and isinstance(values, Mapping):
        return section.kind_for(values)
    return section


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _lookup(
    values: Any,
    path: tuple[str, ...],
    fallback: Any,
) -> Any:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return fallback
        values = values[part]
    return values


def _wrong(
    key: str,
    path: tuple[str, ...],
    owner: type[BaseModel],
    value: Any,
    problem: str,
) -> str:
    if path:
        field = owner.model_fields.get(path[-1])
    else:
        field = None
    if field is None:
        return f"the job must be a table of sections, not {shown(value)}."
    if _is_section(field.annotation):
        return f"{key} must be a section, [{key}] with its keys below it, not {shown(value)}."
    expected = field_kind(field)
    if problem == "missing":
        return f"{key} is missing: it must be {expected}."
    hint = ""
    if isinstance(value, str):
        guess = nearest(value, choices(field.annotation))
        if guess:
            hint = f"; did you mean {value_text(guess)}?"
        else:
            hint = ""
    elif expected == "text" and isinstance(value, bool | int | float):
        hint = f"; write it in quotes: {value_text(value_text(value))}."
    return f"{key} must be {expected}, not {shown(value)}{hint or '.'}"


def _own_words(
    key: str,
    path: tuple[str, ...],
    owner: type[BaseModel],
    value: Any,
    words: str,
) -> str:
    """What a validator said. One of a whole section names its keys itself; one of a key does
    not.
    """
    if path:
        field = owner.model_fields.get(path[-1])
    else:
        field = None
    if field is None or _is_section(field.annotation):
        return words
    return f"{key} = {shown(value)}: {words}"


def _unknown(
    path: tuple[str, ...],
    value: Any,
    owner: type[BaseModel],
    root: type[BaseModel],
) -> str:
    *above, name = path
    section = ".".join(above)
    dotted = ".".join(map(key_text, path))
    here = {key: f"{section}.{key}" if section else key for key in _keys(owner, section, root)}
    everywhere = _everywhere(root)
    if not above and isinstance(value, dict):
        guess = nearest(name, here)
        if guess:
            meant = f"did you mean [{guess}]?"
        else:
            meant = f"the sections are {join([f'[{key}]' for key in here], 'and')}."
        return f"the section [{key_text(name)}] is unknown; {meant}"
    close = nearest(name, here, 0.75)
    known = (
        (here[close] if close and above else None)
        or ELSEWHERE.get(nearest(name, ELSEWHERE, 0.85) or "")
        or next((key for key in everywhere if key.split(".")[-1] == name), None)
        or next((here[key] for key in [nearest(name, here)] if key and above), None)
        or _elsewhere(name, everywhere)
    )
    if known:
        return f"the key {dotted} is unknown; did you mean {known}?"
    if not above:
        return f"the key {dotted} is unknown; every key stands in a section, such as run.rounds."
    return f"the key {dotted} is unknown; the keys of [{section}] are {join(list(here), 'and')}."


def _keys(
    owner: type[BaseModel],
    section: str,
    root: type[BaseModel],
) -> list[str]:
    if section != "method":
        return list(owner.model_fields)
    # A method's own keys stand beside the keys of every method.
    return list(
        dict.fromkeys(
            key for key in (*MethodSection.model_fields, *owner.model_fields) if key != "options"
        )
    )


def _everywhere(root: type[BaseModel]) -> list[str]:
    found = []
    for section, field in root.model_fields.items():
        owner = field.annotation
        if isinstance(owner, type) and issubclass(owner, Section):
            keys = [key for key in owner.offered() if key != "options"]
        else:
            keys = _keys(owner, section, root)  # type: ignore[arg-type]
        found += [f"{section}.{key}" for key in keys]
    return found


def _elsewhere(name: str, everywhere: list[str]) -> str | None:
    guess = nearest(name, [key.split(".")[-1] for key in everywhere], 0.75)
    if guess:
        return next((key for key in everywhere if key.split(".")[-1] == guess), None)
    return None
