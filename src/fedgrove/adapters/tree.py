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
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from fedgrove.adapters.adapter import Factors, factors_of
from fedgrove.adapters.private import PrivacyError, is_private, seal, unseal
from fedgrove.ground.errors import AdapterError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Tree = dict[str, Any]
Keys = tuple[str | int, ...]  # the keys and indices that lead to a node
Kind = TypeVar("Kind")
_KEY = "fedgrove"
_MALFORMED = (
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    RecursionError,
)


def is_record(node: object) -> bool:
    """Whether the node is a dataclass instance that stands for the ``dict`` of its fields."""
    if isinstance(node, type | Factors):
        return False
    return dataclasses.is_dataclass(node)


def table(node: object) -> Tree | None:
    """A dict as it is, a record as the dict of its fields, None for anything else."""
    if isinstance(node, dict):
        return node
    if not is_record(node):
        return None
    fields = dataclasses.fields(cast("DataclassInstance", node))
    return {field.name: getattr(node, field.name) for field in fields}


def plain(tree: object) -> Any:
    """The same tree with dicts in place of its records: what decoding its bytes would give."""
    parts = table(tree)
    if parts is not None:
        return {key: plain(value) for key, value in parts.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return tree


def walk(tree: object) -> Iterator[tuple[Keys, object]]:
    """Every leaf with the keys and indices that lead to it, in the tree's order: tensors, factors,
    plain values, and what is empty. No depth is too much for it.
    """
    todo: list[tuple[Keys, object]] = [((), tree)]
    while todo:
        keys, node = todo.pop()
        parts: Iterable[tuple[str | int, object]] = ()
        found = table(node)
        if found is not None:
            parts = found.items()
        elif isinstance(node, list):
            parts = enumerate(node)
        below: list[tuple[Keys, object]] = []
        for key, value in parts:
            below.append(((*keys, key), value))
        if below:
            below.reverse()
            todo += below
        elif found is not None:
            yield keys, {}  # of a record without fields too
        else:
            yield keys, node


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor ``[...]`` of the tree with its path, in the tree's order; factors are two or three."""
    for keys, leaf in walk(tree):
        where = joined(path, keys)
        if isinstance(leaf, Tensor):
            yield where, leaf
        elif isinstance(leaf, Factors):
            for letter, value in leaf.tensors.items():
                yield f"{where}.{letter}", value


def joined(path: str, keys: Keys) -> str:
    """A path in words: ``offer/method/layer.0``."""
    words = [str(key) for key in keys]
    if path:
        words.insert(0, path)
    return "/".join(words)


def map_leaves(
    tree: object,
    change: Callable[[Keys, object], object],
    *,
    is_leaf: Callable[[object], bool] = lambda node: False,
    keys: Keys = (),
) -> Any:
    """The same tree with ``change(keys, leaf)`` in place of each leaf; a record stays one of its
    class. ``is_leaf``: which dicts, records and lists are leaves too.
    """

    def below(key: str | int, value: object) -> object:
        deeper = (*keys, key)
        return map_leaves(value, change, is_leaf=is_leaf, keys=deeper)

    if is_leaf(tree):
        return change(keys, tree)
    parts = table(tree)
    if parts is not None:
        changed = {key: below(key, value) for key, value in parts.items()}
        if not is_record(tree):
            return changed
        record = cast("DataclassInstance", tree)
        return dataclasses.replace(record, **changed)
    if isinstance(tree, list):
        return [below(index, value) for index, value in enumerate(tree)]
    return change(keys, tree)


def map_tensors(tree: Kind, change: Callable[[Tensor], Tensor]) -> Kind:
    """The same tree with ``change`` applied to each tensor ``[...]``; a record stays one of its
    class.
    """

    def changed(keys: Keys, leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, Factors):
            return leaf.map(change)
        return leaf

    return cast(Kind, map_leaves(tree, changed))


def numbers(tree: object) -> int:
    """How many numbers the tree's tensors hold."""
    return sum(tensor.numel() for _, tensor in leaves(tree))


def nbytes(tree: object) -> int:
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
    words = json.dumps(structure, separators=(",", ":"))
    return _save(tensors, metadata={_KEY: words})


def unpack(blob: bytes) -> Tree:
    """Decode what ``pack`` made. Raises ``AdapterError`` on anything else."""
    try:
        size = int.from_bytes(blob[:8], "little")
        end = 8 + size
        header = json.loads(blob[8:end])
        words = header["__metadata__"][_KEY]
        structure = json.loads(words)
        tensors = _load(blob)
        tree = _decode(structure, tensors)
    except _MALFORMED as error:
        kind = type(error).__name__
        raise AdapterError(
            f"The data is not a Fedgrove tree ({kind}); it was cut short or altered."
        ) from error
    if not isinstance(tree, dict):
        raise AdapterError("The data is not a Fedgrove tree; it was altered.")
    return tree


def _encode(
    node: object,
    tensors: dict[str, Tensor],
    private: bool,
    path: str,
) -> Tree:
    """The structure of the node; its tensors ``[...]`` go into ``tensors``."""

    def below(value: object, where: str) -> Tree:
        return _encode(value, tensors, private, where)

    if isinstance(node, Tensor):
        sealed = is_private(node)
        if sealed and not private:
            raise PrivacyError(f"'{path}' is private to its client and cannot be sent.")
        key = f"t{len(tensors):06d}"
        tensors[key] = _copy(node)
        if sealed:
            return {"t": key, "p": 1}
        return {"t": key}
    if isinstance(node, Factors):
        sides: list[Tree] = []
        for letter, value in node.tensors.items():
            sides.append(below(value, f"{path}.{letter}"))
        return {
            "f": sides,
            "s": _plain(node.scale, path),
        }
    parts = table(node)
    if parts is not None:
        encoded: Tree = {}
        for key, value in parts.items():
            if not isinstance(key, str):
                raise TypeError(f"'{path}' has the key {key!r}; a tree's keys are strings.")
            where = key
            if path:
                where = f"{path}/{key}"
            encoded[key] = below(value, where)
        return {"d": encoded}
    if isinstance(node, list):
        items: list[Tree] = []
        for index, value in enumerate(node):
            items.append(below(value, f"{path}/{index}"))
        return {"l": items}
    return {"v": _plain(node, path)}


def _copy(tensor: Tensor) -> Tensor:
    """A copy ``[...]`` on the CPU: safetensors refuses tensors that share memory, and views are
    common here.
    """
    here = unseal(tensor).detach().cpu()
    return here.clone(memory_format=torch.contiguous_format)


def _plain(value: object, path: str) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return {"float": str(value)}
    raise TypeError(
        f"'{path}' is a {type(value).__name__}; a tree holds tensors, factors and plain values."
    )


def _decode(node: Tree, tensors: dict[str, Tensor]) -> Any:
    """The node of a structure with the tensors ``[...]`` that it names."""
    if "t" in node:
        tensor = tensors[node["t"]]
        if node.get("p"):
            return seal(tensor)
        return tensor
    if "f" in node:
        sides = [_decode(side, tensors) for side in node["f"]]
        scale = _value(node["s"])
        return factors_of(sides, float(scale))
    if "d" in node:
        parts: Tree = {}
        for key, value in node["d"].items():
            parts[key] = _decode(value, tensors)
        return parts
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
    fitted = _fit(kind, value, "")
    return cast(Kind, fitted)


def _fit(
    hint: object,
    value: object,
    path: str,
) -> object:
    """The value as its annotation has it."""
    if hint in (Any, object):
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
    return _fit_leaf(hint, value, path)


def _fit_leaf(
    kind: type,
    value: object,
    path: str,
) -> object:
    number = kind is float and isinstance(value, int)
    right = number or isinstance(value, kind)
    truth = isinstance(value, bool) and kind in (int, float)
    if not right or truth:
        raise _misfit(kind, value, path)
    return value


def _fit_record(
    kind: type[DataclassInstance],
    value: object,
    path: str,
) -> object:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise _misfit(kind, value, path)
    hints = _hints(kind)
    fields = dataclasses.fields(kind)
    known = {field.name: field for field in fields if field.init}
    for key in value:
        if key not in known:
            where = _below(path, key)
            has = ", ".join(known) or "no fields"
            raise AdapterError(f"'{where}' is no field of {kind.__name__}, which has {has}.")
    parts: Tree = {}
    for name, field in known.items():
        where = _below(path, name)
        if name in value:
            parts[name] = _fit(hints[name], value[name], where)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise AdapterError(f"'{where}' is missing, which {kind.__name__} needs.")
    return kind(**parts)


def _fit_list(
    hint: object,
    value: object,
    path: str,
) -> list[object]:
    if not isinstance(value, list):
        raise _misfit(hint, value, path)
    (inner,) = get_args(hint)
    fitted: list[object] = []
    for index, each in enumerate(value):
        part = _fit(inner, each, f"{path}/{index}")
        fitted.append(part)
    return fitted


def _fit_dict(
    hint: object,
    value: object,
    path: str,
) -> Tree:
    if not isinstance(value, dict):
        raise _misfit(hint, value, path)
    _, inner = get_args(hint)
    fitted: Tree = {}
    for key, each in value.items():
        where = _below(path, key)
        fitted[key] = _fit(inner, each, where)
    return fitted


def _fit_union(
    hint: object,
    value: object,
    path: str,
) -> object:
    """The value as the first alternative that it fits."""
    alternatives = get_args(hint)
    others = [each for each in alternatives if each is not types.NoneType]
    if value is None and len(others) < len(alternatives):
        return None
    if len(others) == 1:
        return _fit(others[0], value, path)  # its own words, where it does not fit
    for each in others:
        try:
            return _fit(each, value, path)
        except AdapterError:
            continue
    raise _misfit(hint, value, path)


def _misfit(
    hint: object,
    value: object,
    path: str,
) -> AdapterError:
    if path:
        where = f"'{path}'"
    else:
        where = "The data"
    if value is None:
        found = "None"
    else:
        found = f"a {type(value).__name__}"
    return AdapterError(f"{where} is {found}, where {_words(hint)} is expected.")


def _words(hint: object) -> str:
    if isinstance(hint, type) and get_origin(hint) is None:
        return hint.__name__
    words = str(hint)
    for prefix in ("fedgrove.adapters.adapter.", "torch."):
        words = words.replace(prefix, "")
    return words


def _below(path: str, key: object) -> str:
    name = str(key)[:80]
    if path:
        return f"{path}/{name}"
    return name


@cache
def _hints(kind: type) -> dict[str, object]:
    """A record's annotations, looked up in the module that defines it."""
    try:
        return get_type_hints(kind)
    except NameError as error:
        name = f"{kind.__module__}.{kind.__name__}"
        raise TypeError(
            f"{name} has an annotation that cannot be read ({error}); "
            f"import what it names at run time."
        ) from error
