"""``run.compress``: fewer bytes for each number that travels, the same function for both directions
and every engine.

``fp16`` rounds to half precision (relative error 2^-11 above 6e-5). ``int8`` keeps one scale for
each index of the shorter side of a matrix, which is a rank index of a LoRA factor: ``x = scale ·
q`` with ``|q| <= 127``, so an error of at most half a scale, 0.4 % of that row's largest number.
Rounding is to nearest, so equal content is an equal message.

A compressed tensor is a small table in place of the tensor, so that a message describes itself and
``expand`` needs no setting. Integers, single numbers and plain values travel as they are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import BFloat16, Float, Int8
from torch import Tensor

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.private import PrivacyError, is_private
from fedgrove.adapters.tree import Keys, joined, map_leaves, nbytes, plain
from fedgrove.ground.errors import AdapterError

Compression = Literal["none", "fp16", "int8"]

_KEY = "~"  # no method and no layer is called that
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_LEVELS = 127
_LARGEST = torch.finfo(torch.float16).max
_TINY = torch.finfo(torch.float64).tiny


def squeeze(tree: Any, how: Compression) -> Any:
    """The tree as it travels. Raises ``PrivacyError`` where it holds what is private to a
    client.
    """
    if how == "none":
        return tree

    def smaller(value: Tensor, where: str) -> Any:
        if is_private(value):
            raise PrivacyError(f"'{where}' is private to its client and cannot be sent.")
        if value.ndim == 0 or not value.is_floating_point():
            return value
        if how == "fp16":
            return _half(value)
        return _bytes(value)

    def change(keys: Keys, leaf: Any) -> Any:
        where = joined("", keys)
        if isinstance(leaf, Tensor):
            return smaller(leaf, where)
        if isinstance(leaf, Factors):
            sides = [smaller(leaf.A, f"{where}.A"), smaller(leaf.B, f"{where}.B")]
            return {_KEY: "factors", "sides": sides, "scale": leaf.scale}
        return leaf

    return map_leaves(plain(tree), change)


def expand(tree: Any) -> Any:
    """The squeezed tree as the other side reads it. Raises ``AdapterError`` for what ``squeeze``
    never made.
    """
    return map_leaves(tree, lambda keys, leaf: _expanded(leaf), is_leaf=_is_compressed)


def passed(tree: Any, how: Compression) -> Any:
    """What the other side reads of the tree: for an engine without a wire."""
    if how == "none":
        return tree
    return expand(squeeze(tree, how))


def sent_bytes(tree: Any, how: Compression) -> int:
    """Bytes of the tree's tensors on the wire, without the framing. Refuses what is private."""
    return nbytes(squeeze(tree, how))


def _half(value: Float[Tensor, "*shape"]) -> dict[str, Any]:
    short = value.detach().clamp(-_LARGEST, _LARGEST).half()
    return {_KEY: "fp16", "of": _name(value), "x": short}


def _bytes(value: Float[Tensor, "*shape"]) -> dict[str, Any]:
    table, turned = _rows(value.detach())
    # bfloat16 has float32's range in two bytes. Its rounding, 2^-9, is a quarter of a step at the
    # largest number, which so stays at 127: nothing loses more than half a step, and a tensor that
    # came this way goes the same way again.
    scale: BFloat16[Tensor, " short"] = (table.abs().amax(dim=1) / _LEVELS).bfloat16()
    step = scale.double().clamp_min(_TINY)[:, None]
    levels = (table.double() / step).round()
    q: Int8[Tensor, "short long"] = levels.clamp(-_LEVELS, _LEVELS).to(torch.int8)
    if turned:
        q = q.T
    shaped = q.reshape(value.shape).contiguous()
    return {_KEY: "int8", "of": _name(value), "x": shaped, "scale": scale}


def _is_compressed(node: Any) -> bool:
    return isinstance(node, dict) and _KEY in node


def _expanded(leaf: Any) -> Any:
    if not _is_compressed(leaf):
        return leaf
    try:
        return _restored(leaf)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise AdapterError(
            f"A compressed tensor is none ({type(error).__name__}); the message was altered on "
            f"its way."
        ) from error


def _restored(node: dict[str, Any]) -> Tensor | Factors:
    kind = node[_KEY]
    if kind == "factors":
        A, B = (expand(side) for side in node["sides"])
        if not (isinstance(A, Tensor) and isinstance(B, Tensor)):
            raise TypeError("factors")
        return Factors(A, B, float(node["scale"]))
    dtype, x = _DTYPES[node["of"]], node["x"]
    if kind == "fp16" and x.dtype == torch.float16:
        half: Tensor = x.to(dtype)
        return half
    if kind != "int8" or x.dtype != torch.int8 or node["scale"].dtype != torch.bfloat16:
        raise ValueError(str(kind))
    table, turned = _rows(x)
    value = table.double() * node["scale"].double()[:, None]
    if turned:
        value = value.T
    return value.reshape(x.shape).to(dtype).contiguous()


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
