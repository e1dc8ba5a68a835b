"""What a key accepts, in words: one text for the errors, for ``fedgrove job --explain`` and for the
docs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from fedgrove.job.toml import value_text


def field_kind(field: FieldInfo) -> str:
    """E.g. ``an integer of at least 1`` or ``"adamw" or "sgd"``."""
    return kind(field.annotation, field.metadata)


def kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The words for a type annotation with its constraints; ``None`` is left out (a key is unset by
    leaving it out).
    """
    return join(_alternatives(annotation, metadata))


def _alternatives(annotation: Any, metadata: Sequence[Any] = ()) -> list[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0], [*metadata, *_flat(arguments[1:])])
    if origin in (Union, UnionType):
        return [
            words
            for part in arguments
            if part is not NoneType
            for words in _alternatives(part, metadata)
        ]
    if origin is Literal:
        return [value_text(choice) for choice in arguments]
    if origin in (list, tuple):
        least = max(
            (limit.min_length for limit in metadata if isinstance(limit, MinLen)),
            default=0,
        )
        return [f"a list {f'of {least} or more ' if least else ''}(each {kind(arguments[0])})"]
    if origin is dict:
        return [f"a table (each {kind(arguments[1])})"]
    if annotation is bool:
        return ["true", "false"]
    simple: dict[Any, str] = {int: "an integer", float: "a number", str: "text"}
    return [simple[annotation] + _bounds(metadata) if annotation in simple else "a plain value"]


def choices(annotation: Any) -> list[str]:
    """The words that a key accepts as they stand, for "did you mean"."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [choice for part in get_args(annotation) for choice in choices(part)]


def join(words: Sequence[str], last: str = "or") -> str:
    """``a, b or c``."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def nearest(
    name: str,
    known: Iterable[str],
    cutoff: float = 0.6,
) -> str | None:
    """The known name most like ``name``, whatever the case and the kind of dash; None where none is
    like it.
    """
    plain = {_plain(candidate): candidate for candidate in known}
    begun = [
        candidate for candidate in plain if len(name) > 2 and candidate.startswith(_plain(name))
    ]
    if len(begun) == 1:
        found = begun
    else:
        found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=cutoff)
    if found:
        return plain[found[0]]
    return None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _flat(metadata: Iterable[Any]) -> list[Any]:
    return [
        limit
        for item in metadata
        for limit in (item.metadata if isinstance(item, FieldInfo) else [item])
    ]


def _bounds(metadata: Sequence[Any]) -> str:
    words = []
    for limit in metadata:
        if isinstance(limit, Ge):
            words.append(f"of at least {limit.ge}")
        elif isinstance(limit, Gt):
            words.append(f"above {limit.gt}")
        elif isinstance(limit, Le):
            words.append(f"at most {limit.le}")
        elif isinstance(limit, Lt):
            words.append(f"below {limit.lt}")
    if words:
        return " " + " and ".join(words)
    return ""
