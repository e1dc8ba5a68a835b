"""Tensors that belong to a client. The taint follows arithmetic; the wire refuses whatever carries
it.

``seal`` marks a tensor; every torch operation on a sealed tensor gives sealed tensors; reading one
out as plain numbers, or writing one into a plain tensor, is an error. ``unseal`` is for the
training kernel and for a client's own store, which never leave the client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fedgrove.ground.errors import FedgroveError
from fedgrove.ground.plain import Given

_READS_OUT = {
    "item",
    "tolist",
    "numpy",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__array__",
    "__iter__",
}


class PrivacyError(FedgroveError):
    """Something private to a client was about to leave it."""


class Private(Tensor):
    """A tensor that must not leave its client. Made by ``seal``."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Given | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS_OUT:
            raise PrivacyError(
                f"A private tensor was read out with {name}(); keep it in the client's own store."
            )
        in_place = name.endswith("_") and not name.endswith("__")
        writes = in_place or name == "__setitem__"
        if writes and args:
            target = args[0]
        else:
            target = kwargs.get("out")
        if isinstance(target, Tensor) and not isinstance(target, Private):
            raise PrivacyError(
                f"A private tensor was written into a plain one with {name}(); seal the target "
                f"first."
            )
        return super().__torch_function__(func, types, args, dict(kwargs))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PrivacyError("A private tensor cannot be pickled.")


def seal(tensor: Tensor) -> Tensor:
    """The same tensor ``[...]`` (no copy, detached from any graph), marked private."""
    return tensor.detach().as_subclass(Private)


def unseal(tensor: Tensor) -> Tensor:
    """The same tensor ``[...]`` (no copy) as a plain one."""
    if not isinstance(tensor, Private):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def is_private(tensor: Tensor) -> bool:
    """Whether the tensor ``[...]`` is marked."""
    return isinstance(tensor, Private)
