"""Marks on the keys of a section: what is decided at the start, what belongs to another key's choice,
what says something of one data set.

A mark stands in the field's annotation, ``Annotated[int, Automatic("machine")]``, so that a new key
brings its own along and no list elsewhere has to know of it. Names of other keys are those of the
same section. Which keys there are depends on what was chosen, so a job is asked, and not its class.
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
    """Another value is another choice: it drops what is ``Of`` the key."""


@dataclass(frozen=True)
class Of:
    """The key describes what ``chooser`` chose: another choice drops it."""

    chooser: str


@dataclass(frozen=True)
class InsteadOf:
    """Setting the key unsets the other one."""

    other: str


@dataclass(frozen=True)
class NamesColumn:
    """The key names a column of the rows, which a site may call otherwise."""


def marks_of(field: FieldInfo, kind: type[Mark]) -> list[Mark]:
    return [mark for mark in field.metadata if isinstance(mark, kind)]


def keys_with(fields: Mapping[str, FieldInfo], mark: object) -> list[str]:
    """The keys that carry a mark."""
    return [key for key, field in fields.items() if mark in field.metadata]


def sections(model: BaseModel, path: KeyPath = ()) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    """Every section below a model by its path, those within sections too."""
    for name in type(model).model_fields:
        inner = getattr(model, name)
        if isinstance(inner, BaseModel):
            yield (*path, name), type(inner)
            yield from sections(inner, (*path, name))


def marked(root: BaseModel, kind: type[Mark]) -> Iterator[tuple[KeyPath, Mark]]:
    """Every mark of a kind with the path of the key that it is on."""
    for path, section in sections(root):
        for name, field in section.model_fields.items():
            for mark in marks_of(field, kind):
                yield (*path, name), mark


def automatic_keys(root: BaseModel, by: str | None = None) -> list[KeyPath]:
    """The keys that are decided at the start of a run; ``by``: those that this decides."""
    found = marked(root, Automatic)
    return [path for path, mark in found if by is None or mark.by == by]


def choosers(root: BaseModel) -> list[KeyPath]:
    return [path for path, _ in marked(root, Chooser)]


def default_of(root: BaseModel, path: KeyPath) -> Any:
    """A key's default; None where it has none."""
    *above, name = path
    section = dict(sections(root))[tuple(above)]
    default = section.model_fields[name].get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return None
    return default
