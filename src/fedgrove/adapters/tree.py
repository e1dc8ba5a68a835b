"""Trees of tensors and plain values: what travels, what is kept, what a checkpoint holds.

A tree is a nesting of ``dict`` (string keys) and ``list`` with leaves: tensor, ``Factors``, str,
int, float, bool, None. A dataclass instance, a *record*, stands for the ``dict`` of its fields.

One encoding serves the wire and the checkpoints: a safetensors blob whose single metadata key holds
the structure as JSON. Nothing is ever pickled, and reading a blob cannot run code: it gives plain
dicts, of which ``typed`` makes the record that the reader expects.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.private import PrivacyError, is_private, seal, unseal
from fedgrove.ground.errors import AdapterError

Tree = dict[str, Any]
Keys = tuple[str | int, ...]  # the keys and indices that lead to a node
Kind = TypeVar("Kind")
_KEY = "fedgrove"


def is_record(node: object) -> bool:
    """Whether the node is a dataclass instance that stands for the ``dict`` of its fields."""
    if isinstance(node, type | Factors):
        return False
    return dataclasses.is_dataclass(node)


def table(node: object) -> dict[str, Any] | None:
    """A dict as it is, a record as the dict of its fields, None for anything else."""
    if isinstance(node, dict):
        return node
    if not is_record(node):
        return None
    names = [field.name for field in dataclasses.fields(cast(Any, node))]
    return {name: getattr(node, name) for name in names}


def plain(tree: Any) -> Any:
    """The same tree with dicts in place of its records: what decoding its bytes would give."""
    if (parts := table(tree)) is not None:
        return {key: plain(value) for key, value in parts.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return tree


def walk(tree: Any) -> Iterator[tuple[Keys, Any]]:
    """Every leaf with the keys and indices that lead to it, in the tree's order: tensors, factors,
    plain values, and what is empty. No depth is too much for it.
    """
    todo: list[tuple[Keys, Any]] = [((), tree)]
    while todo:
        keys, node = todo.pop()
        parts: Iterable[tuple[str | int, Any]] = ()
        if (found := table(node)) is not None:
            parts = found.items()
        elif isinstance(node, list):
            parts = enumerate(node)
        below = [((*keys, key), value) for key, value in parts]
        if below:
            todo.extend(reversed(below))
        elif found is not None:
            yield keys, {}  # of a record without fields too
        else:
            yield keys, node


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the tree with its path, in the tree's order; factors are two."""
    for keys, leaf in walk(tree):
        where = joined(path, keys)
        if isinstance(leaf, Tensor):
            yield where, leaf
        elif isinstance(leaf, Factors):
            yield f"{where}.A", leaf.A
            yield f"{where}.B", leaf.B


def joined(path: str, keys: Keys) -> str:
    """A path in words: ``offer/method/layer.0``."""
    if path:
        words = [path]
    else:
        words = []
    return "/".join([*words, *map(str, keys)])


def map_leaves(
    tree: Any,
    change: Callable[[Keys, Any], Any],
    *,
    is_leaf: Callable[[Any], bool] = lambda node: False,
    keys: Keys = (),
) -> Any:
    """The same tree with ``change(keys, leaf)`` in place of each leaf; a record stays one of its
    class. ``is_leaf``: which dicts, records and lists are leaves too.
    """

    def below(key: str | int, value: Any) -> Any:
        return map_leaves(value, change, is_leaf=is_leaf, keys=(*keys, key))

    if is_leaf(tree):
        return change(keys, tree)
    if (parts := table(tree)) is not None:
        changed = {key: below(key, value) for key, value in parts.items()}
        if is_record(tree):
            return dataclasses.replace(tree, **changed)
        return changed
    if isinstance(tree, list):
        return [below(index, value) for index, value in enumerate(tree)]
    return change(keys, tree)


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with ``change`` applied to each tensor; a record stays one of its class."""

    def changed(keys: Keys, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, Factors):
            return leaf.map(change)
        return leaf

    return map_leaves(tree, changed)


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


def pack(tree: object, *, private: bool = False) -> bytes:
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
        if sealed:
            return {"t": key, "p": 1}
        return {"t": key}
    if isinstance(node, Factors):
        return {
            "f": [
                _encode(node.A, tensors, private, f"{path}.A"),
                _encode(node.B, tensors, private, f"{path}.B"),
            ],
            "s": _plain(node.scale, path),
        }
    if (parts := table(node)) is not None:
        encoded = {}
        for key, value in parts.items():
            if not isinstance(key, str):
                raise TypeError(f"'{path}' has the key {key!r}; a tree's keys are strings.")
            encoded[key] = _encode(value, tensors, private, f"{path}/{key}" if path else key)
        return {"d": encoded}
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
        if math.isfinite(value):
            return value
        return {"float": str(value)}
    raise TypeError(
        f"'{path}' is a {type(value).__name__}; a tree holds tensors, factors and plain values."
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if "t" in node:
        if node.get("p"):
            return seal(tensors[node["t"]])
        return tensors[node["t"]]
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
    if isinstance(value, dict):
        return float(value["float"])
    return value


# --------------------------------------------------------------------------------------- records
def typed(kind: type[Kind], value: object) -> Kind:
    """The ``kind`` that a decoded dict stands for; one that is a ``kind`` already is given back.

    Fields become what their annotations say: dataclasses, ``X | None``, ``list[…]``, ``dict[str,
    …]``, tensors, factors and plain values. A field with a default may be missing. ``dict`` as the
    kind lets everything pass. Classes come from the caller alone, never from a name in the data.

    Raises:
        AdapterError: a field is unknown, missing or of another kind; it names the field.
        TypeError: an annotation is none that a tree can hold.
    """
    if kind is dict:
        return cast(Kind, value)
    return cast(Kind, _fit(kind, value, ""))


def _fit(hint: Any, value: Any, path: str) -> Any:
    """The value as its annotation has it."""
    if hint is Any or hint is object:
        return value
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _fit_union(hint, value, path)
    if origin is Literal:
        if value not in get_args(hint):
            raise _misfit(hint, value, path)
        return value
    if origin in (list, Sequence):
        return _fit_list(hint, value, path)
    if origin in (dict, Mapping):
        return _fit_dict(hint, value, path)
    if not isinstance(hint, type) or origin is not None:
        raise TypeError(f"'{path}' is annotated as {_words(hint)}, which no tree holds.")
    if dataclasses.is_dataclass(hint) and hint is not Factors:
        return _fit_record(hint, value, path)
    number = hint is float and isinstance(value, int)
    right = number or isinstance(value, hint)
    truth = isinstance(value, bool) and hint in (int, float)
    if not right or truth:
        raise _misfit(hint, value, path)
    return value


def _fit_record(kind: type, value: Any, path: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise _misfit(kind, value, path)
    hints = _hints(kind)
    known = {field.name: field for field in dataclasses.fields(cast(Any, kind)) if field.init}
    for key in value:
        if key not in known:
            has = ", ".join(known) or "no fields"
            raise AdapterError(
                f"'{_below(path, key)}' is no field of {kind.__name__}, which has {has}."
            )
    parts = {}
    for name, field in known.items():
        where = _below(path, name)
        if name in value:
            parts[name] = _fit(hints[name], value[name], where)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise AdapterError(f"'{where}' is missing, which {kind.__name__} needs.")
    return kind(**parts)


def _fit_list(hint: Any, value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise _misfit(hint, value, path)
    (inner,) = get_args(hint)
    return [_fit(inner, each, f"{path}/{index}") for index, each in enumerate(value)]


def _fit_dict(hint: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _misfit(hint, value, path)
    _, inner = get_args(hint)
    return {key: _fit(inner, each, _below(path, key)) for key, each in value.items()}


def _fit_union(hint: Any, value: Any, path: str) -> Any:
    """The value as the first alternative that it fits."""
    others = [each for each in get_args(hint) if each is not types.NoneType]
    if value is None and len(others) < len(get_args(hint)):
        return None
    if len(others) == 1:
        return _fit(others[0], value, path)  # its own words, where it does not fit
    for each in others:
        try:
            return _fit(each, value, path)
        except AdapterError:
            continue
    raise _misfit(hint, value, path)


def _misfit(hint: Any, value: Any, path: str) -> AdapterError:
    if path:
        where = f"'{path}'"
    else:
        where = "The data"
    if value is None:
        found = "None"
    else:
        found = f"a {type(value).__name__}"
    return AdapterError(f"{where} is {found}, where {_words(hint)} is expected.")


def _words(hint: Any) -> str:
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint.__name__
    return str(hint).replace("fedgrove.adapters.adapter.", "").replace("torch.", "")


def _below(path: str, key: object) -> str:
    name = str(key)[:80]
    if path:
        return f"{path}/{name}"
    return name


@cache
def _hints(kind: type) -> dict[str, Any]:
    """A record's annotations, looked up in the module that defines it."""
    try:
        return get_type_hints(kind)
    except NameError as error:
        raise TypeError(
            f"{kind.__module__}.{kind.__name__} has an annotation that cannot be read ({error}); "
            f"import what it names at run time."
        ) from error
