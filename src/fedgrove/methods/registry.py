"""Methods by name: see ``fedgrove.ground.registry``, which finds them.

In a deployment every site must have the package of a method: methods travel by name alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedgrove.ground.registry import Registry

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fedgrove.methods.contract import Method


def _base() -> type[Any]:
    from fedgrove.methods.contract import Method

    return Method


GROUP = "fedgrove.methods"
METHODS: Registry[Method] = Registry(
    "method",
    "method.name",
    GROUP,
    "fedgrove.methods",
    _base,
)

register = METHODS.register
catalogue = METHODS.catalogue
names = METHODS.names
method_class = METHODS.find


def options_of(name: str) -> type[BaseModel]:
    """The pydantic model of a method's own keys."""
    return method_class(name).Options
