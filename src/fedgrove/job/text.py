"""A job as text: the resolved file, the explanation of every key, the commented template."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedgrove.ground.plain import Plain
from fedgrove.job.kinds import field_kind
from fedgrove.job.sections import Section
from fedgrove.job.toml import key_text, value_text

WIDTH = 100


@dataclass(frozen=True)
class KeyLine:
    """One key of a section."""

    key: str
    field: FieldInfo
    value: Any
    default: Any
    only: str = ""  # with which choice the section has it, where that is another than the job's

    @property
    def description(self) -> str:
        return f"{self.only}{self.field.description or ''}"

    def line(self, value: Any) -> str:
        return f"{key_text(self.key)} = {value_text(value)}"

    def example(self) -> Any:
        """A value for a comment: the default, or an example where the default is to be unset."""
        if self.default is not None:
            return self.default
        return next(iter(self.field.examples or []), None)


@dataclass(frozen=True)
class TomlTable:
    """One section, or a section within it, with its keys."""

    name: str
    about: str
    entries: list[KeyLine]


def tables(job: BaseModel) -> Iterator[TomlTable]:
    """Every section of the job in order, a method's own keys beside its name."""
    for name in type(job).model_fields:
        yield from _tables(name, getattr(job, name))


def to_toml(job: BaseModel) -> str:
    blocks = []
    for table in tables(job):
        lines = [entry.line(entry.value) for entry in table.entries if entry.value is not None]
        blocks.append("\n".join([f"[{table.name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def explain(job: BaseModel) -> str:
    blocks = []
    for table in tables(job):
        blocks.append(f"[{table.name}]  {table.about}")
        for entry in table.entries:
            head = (
                f"  {table.name}.{entry.key}: {field_kind(entry.field)}; default: "
                f"{value_text(entry.default)}"
            )
            if entry.value != entry.default and not entry.only:
                head += f"; here: {value_text(entry.value)}"
            body = textwrap.fill(
                entry.description,
                WIDTH,
                initial_indent=" " * 6,
                subsequent_indent=" " * 6,
            )
            blocks.append(f"{_wrap(head)}\n{body}")
    return "\n\n".join(blocks) + "\n"


def template(job: BaseModel) -> str:
    """A job file in which what differs from the defaults is set and everything else is a
    comment.
    """
    blocks = [
        "# A Fedgrove job. What is commented out is a default (or, where a key is not set by "
        "default, an example).\n"
        "# `fedgrove job FILE` checks it, `fedgrove data FILE` shows who would hold what, "
        "`fedgrove run FILE` runs it."
    ]
    for table in tables(job):
        lines = ["", *_comment(table.about), f"[{table.name}]"]
        for entry in table.entries:
            said = entry.value != entry.default or entry.key == "name" or entry.key == "by"
            chosen = said and not entry.only
            line = entry.line(entry.value) if chosen else f"# {entry.line(entry.example())}"
            lines += [*_comment(f"{entry.key}: {entry.description}", "#   "), line]
        blocks.append("\n".join(lines))
    return "\n".join(blocks) + "\n"


def _tables(name: str, section: BaseModel) -> Iterator[TomlTable]:
    inner = {key: value for key, value in _values(section).items() if isinstance(value, BaseModel)}
    if isinstance(section, Section):
        keys = section.ordered()
    else:
        keys = list(type(section).model_fields)
    entries = [_entry(section, key) for key in keys if key not in inner]
    if options := inner.pop("options", None):  # a method's own keys stand beside its name
        entries += [_entry(options, key) for key in type(options).model_fields]
    if isinstance(section, Section):
        entries += [_entry_of_another(key, *found) for key, found in section.others().items()]
    yield TomlTable(name, inspect.cleandoc(type(section).__doc__ or "").replace("\n", " "), entries)
    for key, value in inner.items():
        yield from _tables(f"{name}.{key}", value)


def _values(section: BaseModel) -> Plain:
    return {key: getattr(section, key) for key in type(section).model_fields}


def _entry(section: BaseModel, key: str) -> KeyLine:
    field = type(section).model_fields[key]
    default = field.get_default(call_default_factory=True)
    return KeyLine(
        key,
        field,
        getattr(section, key),
        None if default is PydanticUndefined else default,
    )


def _entry_of_another(
    key: str,
    field: FieldInfo,
    only: str,
) -> KeyLine:
    default = field.get_default(call_default_factory=True)
    return KeyLine(key, field, None, default, f"With {only}: ")


def _comment(text: str, later: str = "# ") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent="# ",
        subsequent_indent=later,
        break_on_hyphens=False,
    )


def _wrap(head: str) -> str:
    return textwrap.fill(
        head,
        WIDTH,
        subsequent_indent=" " * 4,
        break_on_hyphens=False,
        break_long_words=False,
    )
