"""Shapes that functions declare (jaxtyping annotations), checked while tests run.

``jaxtyping.install_import_hook`` hands ``checked`` a stand-in with each function's parameters, and
its result as one more, to be called before and after the function. ``checked`` looks at those whose
annotation is a jaxtyping one, and at no other: the rest is mypy's, and costs nothing here. Within
one call a name such as ``rank`` means one number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jaxtyping import AbstractArray

#: what is watched: each computes with tensors, and declares the shapes of all of them
WATCHED = [
    "fedgrove.adapters.assembly",
    *(f"fedgrove.training.{room}" for room in ("cohort", "hooked", "language", "live", "packed")),
    "fedgrove.training.readers",
]


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What raises ``TypeError`` where an argument has not the shape that it declares."""
    if not inspect.isfunction(function):
        return function
    names = list(inspect.signature(function).parameters)
    declared = {name: _declared(function.__annotations__.get(name)) for name in names}
    if not any(declared.values()):
        return _nothing

    def check(*args: Any, **kwargs: Any) -> None:
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            kind = declared.get(name)
            if kind is not None and value is not None and not isinstance(value, kind):
                found = tuple(getattr(value, "shape", ())) or type(value).__name__
                raise TypeError(f"{name} is {found}, declared is {kind.__name__}")

    return check


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Where no tensor's shape is declared."""


def _declared(annotation: Any) -> Any:
    """The jaxtyping annotation that this is, or that it is beside None; None for any other."""
    kind = annotation
    if get_origin(annotation) in (Union, UnionType):
        kinds = [each for each in get_args(annotation) if each is not type(None)]
        kind = kinds[0]
    return kind if isinstance(kind, type) and issubclass(kind, AbstractArray) else None
