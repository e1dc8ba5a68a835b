"""Methods by name. A file of this package that defines a ``Method`` with a name is a method: nothing to register."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from fedgrove.errors import JobError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fedgrove.methods.contract import Method


@cache
def catalogue() -> dict[str, type[Method]]:
    """Every method class by its name, in the order of the names."""
    import fedgrove.methods as package
    from fedgrove.methods.contract import Method

    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        for value in vars(loaded).values():
            if isinstance(value, type) and issubclass(value, Method) and "name" in vars(value):
                found[value.name] = value
    return dict(sorted(found.items()))


def names() -> list[str]:
    return list(catalogue())


def method_class(name: str) -> type[Method]:
    try:
        return catalogue()[name]
    except KeyError:
        raise JobError(f"method.name is '{name}', which does not exist; there are {', '.join(names())}.") from None


def options_of(name: str) -> type[BaseModel]:
    """The pydantic model of a method's own keys."""
    return method_class(name).Options
