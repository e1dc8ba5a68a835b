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

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.private import PrivacyError, is_private
from fedgrove.adapters.tree import nbytes, plain
from fedgrove.ground.errors import AdapterError

Compression = Literal["none", "fp16", "int8"]

_KEY = "~"  # no method and no layer is called that
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_LEVELS = 127
_LARGEST = torch.finfo(torch.float16).max


def squeeze(tree: Any, how: Compression) -> Any:
    """The tree as it travels. Raises ``PrivacyError`` where it holds what is private to a
    client.
    """
    return tree if how == "none" else _squeezed(plain(tree), _half if how == "fp16" else _bytes, "")


def expand(tree: Any) -> Any:
    """The squeezed tree as the other side reads it. Raises ``AdapterError`` for what ``squeeze``
    never made.
    """
    if isinstance(tree, dict):
        if _KEY not in tree:
            return {key: expand(value) for key, value in tree.items()}
        try:
            return _expanded(tree)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise AdapterError(
                f"A compressed tensor is none ({type(error).__name__}); the message was altered on "
                f"its way."
            ) from error
    if isinstance(tree, list):
        return [expand(value) for value in tree]
    return tree


def passed(tree: Any, how: Compression) -> Any:
    """What the other side reads of the tree: for an engine without a wire."""
    return tree if how == "none" else expand(squeeze(tree, how))


def sent_bytes(tree: Any, how: Compression) -> int:
    """Bytes of the tree's tensors on the wire, without the framing. Refuses what is private."""
    return nbytes(squeeze(tree, how))


def _squeezed(node: Any, change: Callable[[Tensor], dict[str, Any]], path: str) -> Any:
    if isinstance(node, Tensor):
        if is_private(node):
            raise PrivacyError(f"'{path}' is private to its client and cannot be sent.")
        return change(node) if node.is_floating_point() and node.ndim else node
    if isinstance(node, Factors):
        sides = [_squeezed(node.A, change, f"{path}.A"), _squeezed(node.B, change, f"{path}.B")]
        return {_KEY: "factors", "sides": sides, "scale": node.scale}
    if isinstance(node, dict):
        return {
            key: _squeezed(value, change, f"{path}/{key}" if path else str(key))
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_squeezed(value, change, f"{path}/{index}") for index, value in enumerate(node)]
    return node


def _half(value: Tensor) -> dict[str, Any]:
    return {_KEY: "fp16", "of": _name(value), "x": value.detach().clamp(-_LARGEST, _LARGEST).half()}


def _bytes(value: Tensor) -> dict[str, Any]:
    table, turned = _rows(value.detach())
    # bfloat16 has float32's range in two bytes. Its rounding, 2^-9, is a quarter of a step at the
    # largest number, which so stays at 127: nothing loses more than half a step, and a tensor that
    # came this way goes the same way again.
    short = (table.abs().amax(dim=1) / _LEVELS).bfloat16()
    steps = table.double() / short.double().clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    q = steps.round().clamp(-_LEVELS, _LEVELS).to(torch.int8)
    shaped = (q.T if turned else q).reshape(value.shape).contiguous()
    return {_KEY: "int8", "of": _name(value), "x": shaped, "scale": short}


def _expanded(node: dict[str, Any]) -> Any:
    kind = node[_KEY]
    if kind == "factors":
        A, B = (expand(side) for side in node["sides"])
        if not (isinstance(A, Tensor) and isinstance(B, Tensor)):
            raise TypeError("factors")
        return Factors(A, B, float(node["scale"]))
    dtype, x = _DTYPES[node["of"]], node["x"]
    if kind == "fp16" and x.dtype == torch.float16:
        return x.to(dtype)
    if kind != "int8" or x.dtype != torch.int8 or node["scale"].dtype != torch.bfloat16:
        raise ValueError(str(kind))
    table, turned = _rows(x)
    value = table.double() * node["scale"].double()[:, None]
    return (value.T if turned else value).reshape(x.shape).to(dtype).contiguous()


def _rows(value: Tensor) -> tuple[Tensor, bool]:
    """The numbers as a matrix with a row for each index of the shorter side; whether it had to be
    turned.
    """
    if value.ndim == 1:
        return value[None], False
    table = value.reshape(value.shape[0], -1)
    return (table, False) if table.shape[0] <= table.shape[1] else (table.T, True)


def _name(value: Tensor) -> str:
    name = str(value.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise AdapterError(f"A {name} tensor is not compressed; messages hold float32.")
    return name
