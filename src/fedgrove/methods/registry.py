"""Methods by name. A file of this package that defines a ``Method`` with a name is a method:
nothing to register.

Methods of other packages come in by an entry point of the group ``fedgrove.methods`` (any installed
package), or with
``register`` (a notebook, a script). In a deployment every site must have the package: methods
travel by name alone.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from fedgrove.ground.errors import JobError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fedgrove.methods.contract import Method


GROUP = "fedgrove.methods"

_REGISTERED: dict[str, type[Method]] = {}

Kind = TypeVar("Kind", bound="type[Method]")


def register(kind: Kind) -> Kind:
    """Make a method known by its name in this process; a decorator. Defined again (a notebook's
    cell), it is replaced.

    Raises ``JobError`` where the class has no name of its own, or that of a method of Fedgrove.
    """
    name = vars(kind).get("name")
    if not isinstance(name, str) or not name:
        raise JobError(
            f"{kind.__name__} has no name of its own; give the class an attribute such as name = "
            f"'my-method'."
        )
    known = catalogue().get(name)
    if known is not None and name not in _REGISTERED:
        raise JobError(
            f"{kind.__name__} is called '{name}', which is {known.title} already; choose another "
            f"name."
        )
    _REGISTERED[name] = kind
    catalogue.cache_clear()
    return kind


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
    for entry in entry_points(group=GROUP):
        try:
            value = entry.load()
        except Exception as error:
            raise JobError(
                f"the method '{entry.name}' of the package "
                f"{entry.dist.name if entry.dist else entry.value} cannot be "
                f"loaded ({type(error).__name__}: {error}); repair or uninstall it."
            ) from error
        found.setdefault(value.name, value)
    return dict(sorted({**found, **_REGISTERED}.items()))


def names() -> list[str]:
    return list(catalogue())


def method_class(name: str) -> type[Method]:
    try:
        return catalogue()[name]
    except KeyError:
        raise JobError(
            f"method.name is '{name}', which does not exist; there are {', '.join(names())}."
        ) from None


def options_of(name: str) -> type[BaseModel]:
    """The pydantic model of a method's own keys."""
    return method_class(name).Options
