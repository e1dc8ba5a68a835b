"""``run.compress``: fewer bytes for each number that travels, the same function for both directions
and every engine.

``fp16`` rounds to half precision (relative error 2^-11 above 6e-5). ``int8`` keeps one scale for
each index of the shorter side of a matrix, which is a rank index of a LoRA factor: ``x = scale ·
q`` with ``|q| <= 127``, so an error of at most half a scale, 0.4 % of that row's largest number.
Rounding is to nearest, so equal content is an equal message.

DoRA's magnitudes travel as they are: they are few, and what training changes of them is below the
rounding of either way.

A compressed tensor is a small table in place of the tensor, so that a message describes itself and
``expand`` needs no setting. Integers, single numbers and plain values travel as they are.
"""

from __future__ import annotations

from typing import Any, Literal, TypeGuard

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor

from fedgrove.adapters.adapter import Factors, factors_of
from fedgrove.adapters.private import PrivacyError, is_private
from fedgrove.adapters.tree import Keys, Tree, joined, map_leaves, nbytes, plain
from fedgrove.ground.errors import AdapterError

Compression = Literal["none", "fp16", "int8"]

_KEY = "~"  # no method and no layer is called that
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_LEVELS = 127
_LARGEST = torch.finfo(torch.float16).max
_TINY = torch.finfo(torch.float64).tiny
_MALFORMED = (
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
)


def squeeze(tree: object, how: Compression) -> object:
    """The tree as it travels. Raises ``PrivacyError`` where it holds what is private to a
    client.
    """
    if how == "none":
        return tree

    def change(keys: Keys, leaf: object) -> object:
        where = joined("", keys)
        if isinstance(leaf, Tensor):
            return _smaller(leaf, how, where)
        if isinstance(leaf, Factors):
            sides: list[Tensor | Tree] = []
            for letter, value in leaf.tensors.items():
                way = how if letter in Factors.letters else "none"
                sides.append(_smaller(value, way, f"{where}.{letter}"))
            return {
                _KEY: "factors",
                "sides": sides,
                "scale": leaf.scale,
            }
        return leaf

    tables = plain(tree)
    return map_leaves(tables, change)


def expand(tree: object) -> Any:
    """The squeezed tree as the other side reads it. Raises ``AdapterError`` for what ``squeeze``
    never made.
    """

    def change(keys: Keys, leaf: object) -> object:
        return _expanded(leaf)

    return map_leaves(tree, change, is_leaf=_is_compressed)


def passed(tree: object, how: Compression) -> Any:
    """What the other side reads of the tree: for an engine without a wire."""
    if how == "none":
        return tree
    sent = squeeze(tree, how)
    return expand(sent)


def sent_bytes(tree: object, how: Compression) -> int:
    """Bytes of the tree's tensors on the wire, without the framing. Refuses what is private."""
    sent = squeeze(tree, how)
    return nbytes(sent)


def _smaller(
    value: Tensor,
    how: Compression,
    where: str,
) -> Tensor | Tree:
    """The tensor ``[...]`` as it travels; ``where`` it stands, for the words."""
    if is_private(value):
        raise PrivacyError(f"'{where}' is private to its client and cannot be sent.")
    if value.ndim == 0 or how == "none":
        return value
    if not value.is_floating_point():
        return value
    if how == "fp16":
        return _half(value)
    return _bytes(value)


def _half(value: Float[Tensor, "*shape"]) -> Tree:
    bounded = value.detach().clamp(-_LARGEST, _LARGEST)
    return {
        _KEY: "fp16",
        "of": _name(value),
        "x": bounded.half(),
    }


def _bytes(value: Float[Tensor, "*shape"]) -> Tree:
    table, turned = _rows(value.detach())
    largest = table.abs().amax(dim=1)
    # bfloat16 has float32's range in two bytes. Its rounding, 2^-9, is a quarter of a step at the
    # largest number, which so stays at 127: nothing loses more than half a step, and a tensor that
    # came this way goes the same way again.
    scale: BFloat16[Tensor, " short"] = (largest / _LEVELS).bfloat16()
    step = scale.double().clamp_min(_TINY)
    levels = table.double() / step[:, None]
    bounded = levels.round().clamp(-_LEVELS, _LEVELS)
    q: Int8[Tensor, "short long"] = bounded.to(torch.int8)
    if turned:
        q = q.T
    shaped = q.reshape(value.shape).contiguous()
    return {
        _KEY: "int8",
        "of": _name(value),
        "x": shaped,
        "scale": scale,
    }


def _is_compressed(node: object) -> TypeGuard[Tree]:
    return isinstance(node, dict) and _KEY in node


def _expanded(leaf: object) -> object:
    if not _is_compressed(leaf):
        return leaf
    try:
        return _restored(leaf)
    except _MALFORMED as error:
        raise AdapterError(
            f"A compressed tensor is none ({type(error).__name__}); the message was altered on "
            f"its way."
        ) from error


def _restored(node: Tree) -> Tensor | Factors:
    """The tensor ``[...]`` or the factors that the table stands for."""
    kind = node[_KEY]
    if kind == "factors":
        return _factors(node)
    dtype = _DTYPES[node["of"]]
    x = node["x"]
    if kind == "fp16" and x.dtype == torch.float16:
        half: Tensor = x.to(dtype)
        return half
    if kind != "int8" or x.dtype != torch.int8:
        raise ValueError(str(kind))
    scale = node["scale"]
    if scale.dtype != torch.bfloat16:
        raise ValueError(str(kind))
    table, turned = _rows(x)
    step = scale.double()[:, None]
    value = table.double() * step
    if turned:
        value = value.T
    shaped = value.reshape(x.shape).to(dtype)
    return shaped.contiguous()


def _factors(node: Tree) -> Factors:
    sides = [expand(side) for side in node["sides"]]
    if not all(isinstance(side, Tensor) for side in sides):
        raise TypeError("factors")
    scale = float(node["scale"])
    return factors_of(sides, scale)


def _rows(value: Tensor) -> tuple[Tensor, bool]:
    """The numbers of ``value [...]`` as a matrix ``[short, long]`` with a row for each index of the
    shorter side; whether it had to be turned.
    """
    if value.ndim == 1:
        return value[None], False
    table = value.reshape(value.shape[0], -1)
    if table.shape[0] <= table.shape[1]:
        return table, False
    return table.T, True


def _name(value: Tensor) -> str:
    """The dtype of ``value [...]`` in words."""
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise AdapterError(f"A {name} tensor is not compressed; messages hold float32.")
    return name
