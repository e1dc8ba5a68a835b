"""Marks on the job's fields: what is decided at the start, and what belongs to another key's choice.

A mark stands in the field's annotation, ``Annotated[int, Automatic("machine")]``, so that a new key
brings its own along and no list elsewhere has to know of it. Names of other keys are those of the
same section.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

KeyPath = tuple[str, ...]  # ("data", "partition", "by")
Mark = TypeVar("Mark")


@dataclass(frozen=True)
class Automatic:
    """Where the key has its default, ``by`` decides at the start of a run, and the run records it.

    "machine": the computer that it runs on. "data": the clients' rows, or what the data are for.
    """

    by: Literal["machine", "data"]


@dataclass(frozen=True)
class Chooser:
    """Another value is another choice. ``alike``: values between which one may change and keep
    what is ``Of`` the key; ``open``: the value that leaves the choice to the data, if any.
    """

    alike: tuple[tuple[str, ...], ...] = ()
    open: str | None = None


@dataclass(frozen=True)
class Of:
    """The key describes what ``chooser`` chose: another choice drops it."""

    chooser: str


@dataclass(frozen=True, init=False)
class Only:
    """The key means something with these values of ``chooser`` alone: others drop it."""

    chooser: str
    values: tuple[str, ...]

    def __init__(self, chooser: str, *values: str):
        object.__setattr__(self, "chooser", chooser)
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class InsteadOf:
    """Setting the key unsets the other one."""

    other: str


def marks_of(field: FieldInfo, kind: type[Mark]) -> list[Mark]:
    return [mark for mark in field.metadata if isinstance(mark, kind)]


def sections(
    model: type[BaseModel], path: KeyPath = ()
) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    """Every section below a model by its path, those within sections too."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield (*path, name), inner
            yield from sections(inner, (*path, name))


def marked(root: type[BaseModel], kind: type[Mark]) -> Iterator[tuple[KeyPath, Mark]]:
    """Every mark of a kind with the path of the key that it is on."""
    for path, section in sections(root):
        for name, field in section.model_fields.items():
            for mark in marks_of(field, kind):
                yield (*path, name), mark


def automatic_keys(root: type[BaseModel], by: str | None = None) -> list[KeyPath]:
    """The keys that are decided at the start of a run; ``by``: those that this decides."""
    found = marked(root, Automatic)
    return [path for path, mark in found if by is None or mark.by == by]


def choosers(root: type[BaseModel]) -> list[KeyPath]:
    return [path for path, _ in marked(root, Chooser)]


def default_of(root: type[BaseModel], path: KeyPath) -> Any:
    """A key's default; None where it has none."""
    *above, name = path
    section = root
    for part in above:
        inner = section.model_fields[part].annotation
        assert isinstance(inner, type)
        section = inner
    default = section.model_fields[name].get_default(call_default_factory=True)
    return None if default is PydanticUndefined else default


def keys_of_another(section: type[BaseModel], chooser: str, before: str, after: str) -> list[str]:
    """The keys of a section that a change of ``chooser`` drops."""
    return [
        name
        for name, field in section.model_fields.items()
        if _is_dropped(field, section.model_fields[chooser], chooser, before, after)
    ]


def _is_dropped(
    field: FieldInfo, choosing: FieldInfo, chooser: str, before: str, after: str
) -> bool:
    (choice,) = marks_of(choosing, Chooser)
    if before == choice.open:  # a choice that was left open is made, not changed
        return False
    akin = any(before in values and after in values for values in choice.alike)
    if not akin and any(mark.chooser == chooser for mark in marks_of(field, Of)):
        return True
    for mark in marks_of(field, Only):
        if mark.chooser != chooser:
            continue
        if after == choice.open:
            return mark.values == (before,)
        return after not in mark.values
    return False


def useless_keys(section: type[BaseModel], values: Mapping[str, Any], chooser: str) -> list[str]:
    """The keys of a section, by ``Only``, that mean nothing with its value of ``chooser``."""
    (choice,) = marks_of(section.model_fields[chooser], Chooser)
    chosen = values[chooser]
    if chosen == choice.open:
        return []
    return [
        name
        for name, field in section.model_fields.items()
        for mark in marks_of(field, Only)
        if mark.chooser == chooser and chosen not in mark.values
    ]
