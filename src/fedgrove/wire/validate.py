"""Which trees may come over the wire: names, shapes, dtypes, finite numbers, sizes. Both sides check
before anything is used.

Every method's messages are trees in which the adapted layers appear by name, each with low-rank
factors or one tensor whose sides follow from the layer; how high the ranks go, the method says. So
one set of rules serves all methods, and what the rules cannot see (a layer left out, an index that
points nowhere) shows when the server's half is tried on it (``sift``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.private import is_private
from fedgrove.adapters.tree import Keys, joined, numbers, walk
from fedgrove.methods.protocols import most_rank, most_rows

if TYPE_CHECKING:
    from fedgrove.methods.contract import Method

DTYPES = (torch.float32, torch.float64)
MOST_LEAVES = 200_000  # tensors and plain values of one message
DEEPEST = 30  # keys that lead to one of them
# no factor, head or router that trains comes near it; one that large would drown everybody else's
LARGEST = 1e6
LONGEST_TEXT = 200  # of a plain text in an update; methods send words such as "root"
SLACK = 100_000  # numbers beside factors, tables and head: scores, masks, counts


@dataclass(frozen=True)
class Bounds:
    """How large what belongs to a layer may be. ``rank`` None: up to the layer's smaller side."""

    sites: Mapping[str, Site]
    rank: int | None
    rows: int

    def most_rank(self, site: Site) -> int:
        if self.rank is None:
            return min(site.in_features, site.out_features)
        return self.rank

    def most_rows(self, site: Site) -> int:
        return max(self.most_rank(site), self.rows)


def size_fault(blob: bytes, limit: int) -> str | None:
    """A clause where the message is larger than ``limit`` bytes."""
    if len(blob) > limit:
        return f"it has {len(blob):,} bytes, and at most {limit:,} are allowed"
    return None


def offer_fault(tree: Any, *, method: Method | None) -> str | None:
    """A clause on what is wrong with what came down, or None. Ranks go up to a layer's smaller side
    (merged stacks).

    ``method`` None: the base model is not loaded yet, so only dtypes, numbers and counts are looked
    at.
    """
    if method is None:
        return _fault(tree, None)
    return _fault(tree, Bounds(method.setting.sites, None, most_rows(method)))


def fault(
    content: Mapping[str, Any], *, method: Method, head: Mapping[str, Tensor] | None = None
) -> str | None:
    """A clause on what is wrong with an update that came up, or None.

    No factor has a higher rank than the method's updates can have; with ``head`` (the first draw,
    by name) given, a head that came along must have its names and shapes, and no other part may
    stand beside the method's.
    """
    if head is not None:
        unknown = sorted(set(content) - {"method", "head"})
        if unknown:
            return f"it has a part {unknown[0]!r}, which no update has"
        if "head" in content and (wrong := _head_fault(content["head"], head)):
            return wrong
    bounds = Bounds(method.setting.sites, most_rank(method), most_rows(method))
    found, most = numbers(content), _most_numbers(bounds, head or {})
    if found > most:
        return f"it has {found:,} numbers, where at most {most:,} have a use"
    return _fault(content, bounds)


def _most_numbers(bounds: Bounds, head: Mapping[str, Tensor]) -> int:
    """Four times both factors of every layer, and the tensors ``[...]`` of the head."""
    sides = ((site, site.in_features + site.out_features) for site in bounds.sites.values())
    whole = sum(bounds.most_rows(site) * both for site, both in sides)
    return 4 * whole + sum(tensor.numel() for tensor in head.values()) + SLACK


# ------------------------------------------------------------------------ the rules
def _fault(tree: Any, bounds: Bounds | None) -> str | None:
    for number, (keys, value) in enumerate(walk(tree)):
        if number == MOST_LEAVES:
            return f"it has more than {MOST_LEAVES:,} parts"
        if len(keys) > DEEPEST:
            return f"its parts are more than {DEEPEST} tables deep"
        if wrong := _value_fault(value, joined("", keys)):
            return wrong
        if bounds is None:
            site = None
        else:
            site = _site_of(keys, bounds.sites)
        if site is None or bounds is None:
            continue
        if wrong := _site_fault(value, joined("", keys), site, bounds):
            return wrong
    if bounds is None:
        return None
    return _names_fault(tree, bounds.sites)


def _site_of(keys: Keys, sites: Mapping[str, Site]) -> Site | None:
    """The adapted layer that a leaf belongs to: the innermost that its keys name."""
    for key in reversed(keys):
        if key in sites:
            return sites[str(key)]
    return None


def _value_fault(value: Any, path: str) -> str | None:
    if isinstance(value, Factors):
        wrong = _tensor_fault(value.A, f"{path}.A") or _tensor_fault(value.B, f"{path}.B")
        if wrong is None and not math.isfinite(value.scale):
            return f"the scale of {path} is {value.scale}"
        return wrong
    if isinstance(value, Tensor):
        return _tensor_fault(value, path)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value}"
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{path} is a text of {len(value)} characters"
    return None


def _tensor_fault(value: Tensor, path: str) -> str | None:
    """What no tensor ``[...]`` may be, wherever it stands."""
    if is_private(value):
        return f"{path} is marked as private to a client"
    if not value.dtype.is_floating_point:
        if value.dtype != torch.int64:
            return f"{path} is {_dtype(value)}, not float32 or int64"
        return None
    if value.dtype not in DTYPES:
        return f"{path} is {_dtype(value)}, not float32"
    if not bool(torch.isfinite(value).all()):
        return f"{path} holds numbers that are not finite"
    if value.numel() and (largest := float(value.abs().max())) > LARGEST:
        return f"{path} holds the number {largest:.2g}, above {LARGEST:g}"
    return None


def _site_fault(value: Any, path: str, site: Site, bounds: Bounds) -> str | None:
    """What does not fit the adapted layer that it belongs to."""
    if isinstance(value, Factors):
        return _factors_fault(value, path, site, bounds.most_rank(site))
    if not isinstance(value, Tensor):
        return None
    most = bounds.most_rows(site)
    if value.ndim == 2:
        return _table_fault(value, path, site, most)
    if value.ndim == 1 and value.numel() > most:
        return f"{path} has {value.numel()} numbers, above {most}"
    if value.ndim > 2:
        return f"{path} has {value.ndim} dimensions"
    return None


def _factors_fault(value: Factors, path: str, site: Site, most: int) -> str | None:
    """``A [rank, in]`` and ``B [out, rank]`` of the layer, with a rank of at most ``most``."""
    A, B = value.A, value.B
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return f"{path} has A of the shape {_shape(A)} and B of {_shape(B)}, which do not fit"
    for letter, tensor, found, wanted in (
        ("A", A, A.shape[1], site.in_features),
        ("B", B, B.shape[0], site.out_features),
    ):
        if found != wanted:
            return (
                f"{letter} of {path} has the shape {_shape(tensor)}, but that layer has {wanted} "
                "features there"
            )
    if value.rank > most:
        return f"{path} has the rank {value.rank}, above {most}"
    return None


def _table_fault(value: Tensor, path: str, site: Site, most: int) -> str | None:
    """A table ``[side, n]`` or ``[n, side]`` with a side of the layer and ``n`` at most ``most``."""
    rows, columns = value.shape
    sides = (site.in_features, site.out_features)
    short = [n for side, n in ((rows, columns), (columns, rows)) if side in sides]
    if not short:
        return (
            f"{path} has the shape {_shape(value)}, but that layer is {site.out_features} by "
            f"{site.in_features}"
        )
    if min(short) > most:
        return f"{path} has the shape {_shape(value)}, with more than {most} on the short side"
    return None


def _names_fault(tree: Any, sites: Mapping[str, Site]) -> str | None:
    """A table that names adapted layers, or holds factors, names nothing but adapted layers."""
    names: dict[Keys, dict[str, None]] = {}  # of each table, in its order
    of_factors = set()
    for keys, leaf in walk(tree):
        for depth, key in enumerate(keys):
            if isinstance(key, str):
                names.setdefault(keys[:depth], {})[key] = None
        if isinstance(leaf, Factors):
            of_factors.add(keys[:-1])
    for where, found in names.items():
        if where not in of_factors and not any(name in sites for name in found):
            continue
        for name in found:
            if name not in sites:
                return f"{joined('', (*where, name))} is no adapted layer of the base model"
    return None


def _head_fault(head: Any, initial: Mapping[str, Tensor]) -> str | None:
    """A head has the names and the shapes of the first draw's tensors ``[...]``."""
    if not isinstance(head, Mapping) or set(head) != set(initial):
        return "its head does not have the parts of the federation's"
    for name, tensor in head.items():
        if not isinstance(tensor, Tensor) or tensor.shape != initial[name].shape:
            return f"head/{name} does not have the shape {_shape(initial[name])}"
    return None


def _shape(tensor: Tensor) -> str:
    """The shape of a tensor ``[...]`` in words."""
    return " x ".join(map(str, tensor.shape)) or "of a single number"


def _dtype(tensor: Tensor) -> str:
    """The dtype of a tensor ``[...]`` in words."""
    return str(tensor.dtype).removeprefix("torch.")
