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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Dora, Factors, Site, Sites
from fedgrove.adapters.private import is_private
from fedgrove.adapters.tree import Keys, joined, numbers, walk
from fedgrove.ground.plain import Given
from fedgrove.methods.protocols import most_rank, most_rows

if TYPE_CHECKING:
    from fedgrove.methods.contract import Method

Head = Mapping[str, Tensor]  # the first draw of the head, by name

DTYPES = (torch.float32, torch.float64)
MOST_LEAVES = 200_000  # tensors and plain values of one message
DEEPEST = 30  # keys that lead to one of them
# no factor, head or router that trains comes near it; one that large would drown everybody else's
LARGEST = 1e6
LONGEST_TEXT = 200  # of a plain text in an update; methods send words such as "root"
SLACK = 100_000  # numbers beside factors, tables and head: scores, masks, counts


@dataclass(frozen=True)
class Bounds:
    """How large what belongs to a layer may be. ``rank`` None: up to the layer's smaller side.
    ``dora``: whether its factors have magnitudes.
    """

    sites: Sites
    rank: int | None
    rows: int
    dora: bool

    def most_rank(self, site: Site) -> int:
        if self.rank is None:
            return min(site.in_features, site.out_features)
        return self.rank

    def most_rows(self, site: Site) -> int:
        rank = self.most_rank(site)
        return max(rank, self.rows)


def size_fault(blob: bytes, limit: int) -> str | None:
    """A clause where the message is larger than ``limit`` bytes."""
    size = len(blob)
    if size > limit:
        return f"it has {size:,} bytes, and at most {limit:,} are allowed"
    return None


def offer_fault(tree: object, *, method: Method | None) -> str | None:
    """A clause on what is wrong with what came down, or None. Ranks go up to a layer's smaller side
    (merged stacks).

    ``method`` None: the base model is not loaded yet, so only dtypes, numbers and counts are looked
    at.
    """
    if method is None:
        return _fault(tree, None)
    bounds = Bounds(
        method.setting.sites,
        rank=None,
        rows=most_rows(method),
        dora=method.setting.norms is not None,
    )
    return _fault(tree, bounds)


def fault(
    content: Given,
    *,
    method: Method,
    head: Head | None = None,
) -> str | None:
    """A clause on what is wrong with an update that came up, or None.

    No factor has a higher rank than the method's updates can have; with ``head`` (the first draw,
    tensors ``[...]`` by name) given, a head that came along must have its names and shapes, and no
    other part may stand beside the method's.
    """
    if head is not None:
        wrong = _parts_fault(content, head)
        if wrong:
            return wrong
    bounds = Bounds(
        method.setting.sites,
        rank=most_rank(method),
        rows=most_rows(method),
        dora=method.setting.norms is not None,
    )
    found = numbers(content)
    most = _most_numbers(bounds, head or {})
    if found > most:
        return f"it has {found:,} numbers, where at most {most:,} have a use"
    return _fault(content, bounds)


def _parts_fault(content: Given, head: Head) -> str | None:
    """A part beside the method's and the head's, or a head unlike the first draw's tensors
    ``[...]``.
    """
    unknown = set(content) - {"method", "head"}
    if unknown:
        return f"it has a part {min(unknown)!r}, which no update has"
    if "head" not in content:
        return None
    return _head_fault(content["head"], head)


def _most_numbers(bounds: Bounds, head: Head) -> int:
    """Four times all factors of every layer, and the tensors ``[...]`` of the head."""
    whole = 0
    for site in bounds.sites.values():
        both = site.in_features + site.out_features
        whole += bounds.most_rows(site) * both + bounds.dora * site.out_features
    of_head = sum(tensor.numel() for tensor in head.values())
    return 4 * whole + of_head + SLACK


# ------------------------------------------------------------------------ the rules
def _fault(tree: object, bounds: Bounds | None) -> str | None:
    for number, (keys, value) in enumerate(walk(tree)):
        if number == MOST_LEAVES:
            return f"it has more than {MOST_LEAVES:,} parts"
        if len(keys) > DEEPEST:
            return f"its parts are more than {DEEPEST} tables deep"
        path = joined("", keys)
        wrong = _value_fault(value, path)
        if wrong:
            return wrong
        if bounds is None:
            continue
        site = _site_of(keys, bounds.sites)
        if site is None:
            continue
        wrong = _site_fault(value, path, site, bounds)
        if wrong:
            return wrong
    if bounds is None:
        return None
    return _names_fault(tree, bounds.sites)


def _site_of(keys: Keys, sites: Sites) -> Site | None:
    """The adapted layer that a leaf belongs to: the innermost that its keys name."""
    for key in reversed(keys):
        if key in sites:
            return sites[str(key)]
    return None


def _value_fault(value: object, path: str) -> str | None:
    if isinstance(value, Factors):
        return _pair_fault(value, path)
    if isinstance(value, Tensor):
        return _tensor_fault(value, path)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value}"
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{path} is a text of {len(value)} characters"
    return None


def _pair_fault(value: Factors, path: str) -> str | None:
    for letter, tensor in value.tensors.items():
        wrong = _tensor_fault(tensor, f"{path}.{letter}")
        if wrong:
            return wrong
    if not math.isfinite(value.scale):
        return f"the scale of {path} is {value.scale}"
    return None


def _tensor_fault(value: Tensor, path: str) -> str | None:
    """What no tensor ``[...]`` may be, wherever it stands."""
    if is_private(value):
        return f"{path} is marked as private to a client"
    dtype = value.dtype
    if dtype == torch.int64:
        return None
    if not dtype.is_floating_point:
        return f"{path} is {_dtype(value)}, not float32 or int64"
    if dtype not in DTYPES:
        return f"{path} is {_dtype(value)}, not float32"
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        return f"{path} holds numbers that are not finite"
    if not value.numel():
        return None
    largest = float(value.abs().max())
    if largest > LARGEST:
        return f"{path} holds the number {largest:.2g}, above {LARGEST:g}"
    return None


def _site_fault(
    value: object,
    path: str,
    site: Site,
    bounds: Bounds,
) -> str | None:
    """What does not fit the adapted layer that it belongs to."""
    if isinstance(value, Factors):
        rank = bounds.most_rank(site)
        wrong = _factors_fault(value, path, site, rank)
        return wrong or _magnitudes_fault(value, path, site, bounds.dora)
    if not isinstance(value, Tensor):
        return None
    most = bounds.most_rows(site)
    if value.ndim == 2:
        return _table_fault(value, path, site, most)
    count = value.numel()
    if bounds.dora:
        most = max(most, site.out_features)
    if value.ndim == 1 and count > most:
        return f"{path} has {count} numbers, above {most}"
    if value.ndim > 2:
        return f"{path} has {value.ndim} dimensions"
    return None


def _factors_fault(
    value: Factors,
    path: str,
    site: Site,
    most: int,
) -> str | None:
    """``A [rank, in]`` and ``B [out, rank]`` of the layer, with a rank of at most ``most``."""
    A = value.A
    B = value.B
    tables = A.ndim == B.ndim == 2
    if not tables or A.shape[0] != B.shape[1]:
        return f"{path} has A of the shape {_shape(A)} and B of {_shape(B)}, which do not fit"
    into = A.shape[1]
    out = B.shape[0]
    if into != site.in_features:
        wrong = f"A of {path} has the shape {_shape(A)}"
        return f"{wrong}, but that layer has {site.in_features} features there"
    if out != site.out_features:
        wrong = f"B of {path} has the shape {_shape(B)}"
        return f"{wrong}, but that layer has {site.out_features} features there"
    if value.rank > most:
        return f"{path} has the rank {value.rank}, above {most}"
    return None


def _magnitudes_fault(value: Factors, path: str, site: Site, dora: bool) -> str | None:
    """``M [out]`` where the job trains DoRA, and nowhere else."""
    if not isinstance(value, Dora):
        if dora:
            return f"{path} lacks the magnitudes that lora.dora trains"
        return None
    if not dora:
        return f"{path} has DoRA's magnitudes, which this job does not train"
    if tuple(value.M.shape) != (site.out_features,):
        wrong = f"M of {path} has the shape {_shape(value.M)}"
        return f"{wrong}, but that layer has {site.out_features} features there"
    return None


def _table_fault(
    value: Tensor,
    path: str,
    site: Site,
    most: int,
) -> str | None:
    """A table ``[side, n]`` or ``[n, side]`` with a side of the layer and ``n`` at most ``most``."""
    rows, columns = value.shape
    into = site.in_features
    out = site.out_features
    short = []
    if rows in (into, out):
        short.append(columns)
    if columns in (into, out):
        short.append(rows)
    if not short:
        return f"{path} has the shape {_shape(value)}, but that layer is {out} by {into}"
    if min(short) > most:
        return f"{path} has the shape {_shape(value)}, with more than {most} on the short side"
    return None


def _names_fault(tree: object, sites: Sites) -> str | None:
    """A table that names adapted layers, or holds factors, names nothing but adapted layers."""
    names: dict[Keys, dict[str, None]] = {}  # of each table, in its order
    of_factors: set[Keys] = set()
    for keys, leaf in walk(tree):
        for depth, key in enumerate(keys):
            if isinstance(key, str):
                found = names.setdefault(keys[:depth], {})
                found[key] = None
        if isinstance(leaf, Factors):
            of_factors.add(keys[:-1])
    for where, found in names.items():
        unknown = [name for name in found if name not in sites]
        if not unknown:
            continue
        some_known = len(unknown) < len(found)
        if some_known or where in of_factors:
            path = joined("", (*where, unknown[0]))
            return f"{path} is no adapted layer of the base model"
    return None


def _head_fault(head: object, initial: Head) -> str | None:
    """A head has the names and the shapes of the first draw's tensors ``[...]``."""
    if not isinstance(head, Mapping):
        return "its head does not have the parts of the federation's"
    if set(head) != set(initial):
        return "its head does not have the parts of the federation's"
    for name, tensor in head.items():
        wanted = initial[name]
        fits = isinstance(tensor, Tensor) and tensor.shape == wanted.shape
        if not fits:
            return f"head/{name} does not have the shape {_shape(wanted)}"
    return None


def _shape(tensor: Tensor) -> str:
    """The shape of a tensor ``[...]`` in words."""
    sides = [str(side) for side in tensor.shape]
    if not sides:
        return "of a single number"
    return " x ".join(sides)


def _dtype(tensor: Tensor) -> str:
    """The dtype of a tensor ``[...]`` in words."""
    return str(tensor.dtype).removeprefix("torch.")
