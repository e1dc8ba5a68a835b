"""Trees of tensors and plain values: what travels, what is kept, what a checkpoint holds.

A tree is a nesting of ``dict`` (string keys) and ``list`` with leaves: tensor, ``Factors``, str,
int, float, bool, None. One encoding serves the wire and the checkpoints: a safetensors blob whose
single metadata key holds the structure as JSON. Nothing is ever pickled, and reading a blob cannot
run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.private import PrivacyError, is_private, seal, unseal
from fedgrove.ground.errors import AdapterError

Tree = dict[str, Any]
_KEY = "fedgrove"


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the tree with its path, in the tree's order."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Factors):
        yield f"{path}.A", tree.A
        yield f"{path}.B", tree.B
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}" if path else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}/{index}")


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with ``change`` applied to each tensor."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Factors):
        return tree.map(change)
    if isinstance(tree, dict):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_tensors(value, change) for value in tree]
    return tree


def numbers(tree: Any) -> int:
    """How many numbers the tree's tensors hold."""
    return sum(tensor.numel() for _, tensor in leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of the tree's tensors, without the framing. Refuses what is private."""
    total = 0
    for path, tensor in leaves(tree):
        if is_private(tensor):
            raise PrivacyError(f"'{path}' is private to its client and cannot be sent.")
        total += tensor.numel() * tensor.element_size()
    return total


def pack(tree: Tree, *, private: bool = False) -> bytes:
    """Encode a tree. Private tensors are refused unless ``private`` (a client's own store)."""
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, tensors, private, "")
    return _save(tensors, metadata={_KEY: json.dumps(structure, separators=(",", ":"))})


def unpack(blob: bytes) -> Tree:
    """Decode what ``pack`` made. Raises ``AdapterError`` on anything else."""
    try:
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + size])
        structure = json.loads(header["__metadata__"][_KEY])
        tree = _decode(structure, _load(blob))
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
    ) as error:
        raise AdapterError(
            f"The data is not a Fedgrove tree ({type(error).__name__}); it was cut short or "
            f"altered."
        ) from error
    if not isinstance(tree, dict):
        raise AdapterError("The data is not a Fedgrove tree; it was altered.")
    return tree


def _encode(node: Any, tensors: dict[str, Tensor], private: bool, path: str) -> Any:
    if isinstance(node, Tensor):
        sealed = is_private(node)
        if sealed and not private:
            raise PrivacyError(f"'{path}' is private to its client and cannot be sent.")
        key = f"t{len(tensors):06d}"
        # A copy: safetensors refuses tensors that share memory, and views are common here.
        tensors[key] = unseal(node).detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"t": key, "p": 1} if sealed else {"t": key}
    if isinstance(node, Factors):
        return {
            "f": [
                _encode(node.A, tensors, private, f"{path}.A"),
                _encode(node.B, tensors, private, f"{path}.B"),
            ],
            "s": _plain(node.scale, path),
        }
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, str):
                raise TypeError(f"'{path}' has the key {key!r}; a tree's keys are strings.")
        return {
            "d": {
                key: _encode(value, tensors, private, f"{path}/{key}" if path else key)
                for key, value in node.items()
            }
        }
    if isinstance(node, list):
        return {
            "l": [
                _encode(value, tensors, private, f"{path}/{index}")
                for index, value in enumerate(node)
            ]
        }
    return {"v": _plain(node, path)}


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    raise TypeError(
        f"'{path}' is a {type(value).__name__}; a tree holds tensors, factors and plain values."
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if "t" in node:
        return seal(tensors[node["t"]]) if node.get("p") else tensors[node["t"]]
    if "f" in node:
        return Factors(
            A=_decode(node["f"][0], tensors),
            B=_decode(node["f"][1], tensors),
            scale=float(_value(node["s"])),
        )
    if "d" in node:
        return {key: _decode(value, tensors) for key, value in node["d"].items()}
    if "l" in node:
        return [_decode(value, tensors) for value in node["l"]]
    return _value(node["v"])


def _value(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value
