"""What the command line says about a rule (``--option key=value``, ``--weights``), and what to say
of names and values that are wrong.

A key is one of the method's own that its rule reads (``Needs.options``), or one of ``Directories``
that only adapters from elsewhere need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from fedgrove.ground.errors import AdapterError
from fedgrove.ground.plain import Given, Plain
from fedgrove.job.kinds import choices, field_kind, join, nearest
from fedgrove.job.toml import parse_value, shown, value_text
from fedgrove.methods.contract import Method
from fedgrove.methods.registry import catalogue
from fedgrove.methods.rule import Needs, ServerRule, stated

Model = TypeVar("Model", bound=BaseModel)


class Directories(BaseModel):
    """The keys about directories; each only where the rule needs it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rescale: Literal["B"] | None = Field(
        None, description="Unequal scales alpha / r: fold them into B first. Not set: refuse them."
    )
    round: int | None = Field(
        None,
        ge=1,
        description="Number of this round. Not set: one more than that of --previous.",
    )
    seed: int = Field(0, ge=0, description="Of the rule's random choices.")
    heads: Literal["mean", "leave"] = Field(
        "mean",
        description="Heads and other saved modules that all clients have in one shape: average "
        "them, or leave them out.",
    )


@dataclass(frozen=True)
class Chosen:
    """The keys as given: the method's own options, those about directories, and both for the
    record.
    """

    method: BaseModel
    directories: Directories
    record: Given


def rules() -> dict[str, tuple[type[Method], type[ServerRule]]]:
    """Every method with a rule for directories, by name."""
    found = {}
    for name, kind in catalogue().items():
        rule = stated(kind)
        if not isinstance(rule, str):
            found[name] = (kind, rule)
    return found


def named_rules(wanted: Callable[[Needs], bool]) -> str:
    """The names of the methods whose rules need what is wanted, for people."""
    found = rules().items()
    names = [name for name, (_, rule) in found if wanted(rule.needs)]
    return ", ".join(names)


def rule_of(name: str) -> tuple[type[Method], type[ServerRule]]:
    """The method of that name and its rule. AdapterError where there is none, which says why."""
    kind = catalogue().get(name)
    if kind is None:
        raise _unknown(name)
    rule = stated(kind)
    if isinstance(rule, str):
        raise AdapterError(f"{name} has no offline rule: {rule}.")
    return kind, rule


def parse_options(
    given: Sequence[str],
    kind: type[Method],
    needs: Needs,
) -> Chosen:
    """``["K=3", "tau=0.1"]`` as the rule's options. Raises AdapterError in one sentence for the
    first mistake.
    """
    own = {key: kind.Options.model_fields[key] for key in needs.options}
    about = _about_directories(needs)
    fields = {**about, **own}
    values = _values(given, fields, kind.name)
    of_method: Plain = {}
    of_directories: Plain = {}
    for key, value in values.items():
        if key in own:
            of_method[key] = value
        else:
            of_directories[key] = value
    method = _checked(kind.Options, of_method)
    directories = _checked(Directories, of_directories)
    record: Plain = {}
    for key in fields:
        if key in own:
            record[key] = getattr(method, key)
        else:
            record[key] = getattr(directories, key)
    return Chosen(method, directories, record)


def parsed(given: Sequence[str], kind: type[Model], whose: str) -> Model:
    """``["top_k=3"]`` as the options of ``whose``. Raises AdapterError for the first mistake."""
    return _checked(kind, _values(given, kind.model_fields, whose))


def parse_weights(text: str | None, count: int) -> list[float] | None:
    """``"120,80"`` as weights in the order of the directories; None is uniform."""
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise AdapterError(
            f"--weights '{text}' must be numbers with commas between them, for example 120,80."
        ) from None
    if len(weights) != count:
        raise AdapterError(
            f"--weights has {len(weights)} numbers for {count} adapters; give one for each, in "
            f"order."
        )
    in_range = all(0 <= weight < math.inf for weight in weights)
    if not in_range or not any(weights):
        raise AdapterError(f"--weights '{text}' must be finite, not negative, and not all zero.")
    return weights


def _about_directories(needs: Needs) -> dict[str, FieldInfo]:
    wanted = {
        "rescale": needs.equal_scales,
        "round": needs.rounds,
        "seed": needs.seed,
        "heads": True,
    }
    keys = [key for key, need in wanted.items() if need]
    return {key: Directories.model_fields[key] for key in keys}


def _values(
    given: Sequence[str],
    fields: Mapping[str, FieldInfo],
    method: str,
) -> Plain:
    values: Plain = {}
    for text in given:
        key, equals, written = (part.strip() for part in text.partition("="))
        if not equals or not key or not written:
            raise AdapterError(
                f"--option '{text}' is no setting; write key=value, for example {_example(fields)}."
            )
        if key not in fields:
            meant = _meant(key, list(fields))
            raise AdapterError(f"--option {key}: {method} has no such key; {meant}")
        if key in values:
            raise AdapterError(f"--option {key} is given twice; give it once.")
        value = parse_value(written)
        if isinstance(value, float) and not math.isfinite(value):
            raise _wrong(key, fields[key], value)
        values[key] = value
    return values


def _checked(model: type[Model], values: Given) -> Model:
    try:
        return model.model_validate(values, strict=True)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        if item["type"] == "value_error":
            said = str(item["ctx"]["error"])
            words = said.replace("method.", "").rstrip(".")
            raise AdapterError(f"--option: {words}.") from None
        name = str(item["loc"][0])
        raise _wrong(name, model.model_fields[name], values[name]) from None


def _wrong(key: str, field: FieldInfo, value: object) -> AdapterError:
    guess = None
    if isinstance(value, str):
        guess = nearest(value, choices(field.annotation))
    hint = "."
    if guess:
        hint = f"; did you mean {key}={guess}?"
    kind = field_kind(field)
    return AdapterError(f"--option {key} must be {kind}, not {shown(value)}{hint}")


def _unknown(name: str) -> AdapterError:
    guess = nearest(name, catalogue())
    if guess:
        meant = f"did you mean {guess}?"
    else:
        known = join(list(rules()), "and")
        meant = f"the rules are {known}."
    return AdapterError(f"The method '{name}' is unknown; {meant}")


def _meant(key: str, known: Sequence[str]) -> str:
    if not known:
        return "it takes none."
    guess = nearest(key, known)
    if guess:
        return f"did you mean {guess}?"
    return f"its keys are {join(list(known), 'and')}."


def _example(fields: Mapping[str, FieldInfo]) -> str:
    """A setting that could be given."""
    for key, field in fields.items():
        words = choices(field.annotation)
        if words:
            return f"{key}={words[0]}"
        if field.default is not None:
            return f"{key}={value_text(field.default)}"
    return "K=3"
