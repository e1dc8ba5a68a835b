"""What may come over the wire: names, shapes, dtypes, finite numbers, sizes. Both sides check
before anything is used.

Every method's messages are trees in which the adapted layers appear by name, each with low-rank
factors or one tensor whose sides follow from the layer. So one set of rules serves all methods, and
what the rules cannot see (a layer left out, an index that points nowhere) shows when the server's
half is tried on it: ``sift``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.private import is_private
from fedgrove.adapters.tree import numbers, plain
from fedgrove.engines.base import infinite_at
from fedgrove.ground.errors import RunError

if TYPE_CHECKING:
    from fedgrove.methods.contract import ClientInfo, Method, Update

DTYPES = (torch.float32, torch.float64)
MOST_LEAVES = 200_000  # tensors and plain values of one message
# no factor, head or router that trains comes near it; one that large would drown everybody else's
LARGEST = 1e6
LONGEST_TEXT = 200  # of a plain text in an update; methods send words such as "root"
MOST = 10**12  # of any count that a client tells
EXPERTS = 64  # rows of a router: groups that a method can have at one layer

Sites = Mapping[str, Site]


def size_fault(blob: bytes, limit: int) -> str | None:
    """A clause where the message is larger than ``limit`` bytes."""
    if len(blob) > limit:
        return f"it has {len(blob):,} bytes, and at most {limit:,} are allowed"
    return None


def offer_fault(tree: Any, *, sites: Sites | None) -> str | None:
    """A clause on what is wrong with what came down, or None. Ranks go up to a layer's smaller side
    (merged stacks).

    ``sites`` None: the base model is not loaded yet, so only dtypes, numbers and counts are looked
    at.
    """
    return _fault(tree, sites, None)


def fault(
    content: Mapping[str, Any],
    *,
    method: Method,
    client: ClientInfo,
    offer: Mapping[str, Any] | None = None,
    round: int = 0,
    head: Mapping[str, Tensor] | None = None,
) -> str | None:
    """A clause on what is wrong with an update that ``client`` sent up, or None.

    No factor has a higher rank than the federation's R; with ``head`` (the first draw) given, a
    head that came along must have its names and shapes, and no other part may stand beside the
    method's.
    """
    if head is not None:
        unknown = sorted(set(content) - {"method", "head"})
        if unknown:
            return f"it has a part {unknown[0]!r}, which no update has"
        if "head" in content and (wrong := _head_fault(content["head"], head)):
            return wrong
    sites, rank = method.setting.sites, method.setting.rank
    whole = sum(rank * (site.in_features + site.out_features) for site in sites.values())
    most = 4 * whole + sum(tensor.numel() for tensor in (head or {}).values()) + 100_000
    if (found := numbers(content)) > most:
        return f"it has {found:,} numbers, where at most {most:,} have a use"
    return _fault(content, sites, rank)


def refuse_loss(before: Any, after: Any, sites: Sites) -> None:
    """Raises ``RunError`` where an adapted layer of the state before is nowhere in the state after.

    Otherwise one update without a layer could take it from everybody: alone it aggregates well.
    """
    gone = sorted(_named(plain(before), sites) - _named(plain(after), sites))
    if gone:
        raise RunError(f"the next state would lack the layer {gone[0]}")


def _named(tree: Any, sites: Sites) -> set[str]:
    """The adapted layers that stand anywhere in a tree."""
    if isinstance(tree, Mapping):
        return set().union(
            *(_named(value, sites) for value in tree.values()), set(tree) & set(sites)
        )
    if isinstance(tree, list | tuple):
        return set().union(*(_named(value, sites) for value in tree))
    return set()


def sift(
    aggregate: Callable[[Sequence[Update]], Any], updates: Sequence[Update]
) -> tuple[Any | None, list[tuple[str, str]]]:
    """(the new state, [(client, why) ...] of those left out); the state is None where nobody's
    update can be used.

    ``aggregate`` is pure, so it can be tried. Where it fails or gives a number that is not finite,
    those whose update fails alone are left out; where each works alone, the one without whom the
    rest works.
    """
    state, why = _try(aggregate, updates)
    if why is None:
        return state, []
    alone = [(update, _try(aggregate, [update])[1]) for update in updates]
    out = [(update.client, reason) for update, reason in alone if reason is not None]
    kept = [update for update, reason in alone if reason is None]
    while kept:
        state, why = _try(aggregate, kept)
        if why is None:
            return state, out
        for suspect in kept:
            rest = [update for update in kept if update is not suspect]
            if rest and _try(aggregate, rest)[1] is None:
                break
        else:
            # No single one explains it: nobody is more suspect than the others.
            return None, [*out, *((update.client, why) for update in kept)]
        out.append((suspect.client, f"it does not go with the others' ({why})"))
        kept = rest
    return None, out


def _try(
    aggregate: Callable[[Sequence[Update]], Any], updates: Sequence[Update]
) -> tuple[Any, str | None]:
    try:
        state = aggregate(updates)
    except Exception as error:
        return (
            None,
            f"the server's half failed on it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})",
        )
    if (path := infinite_at(state)) is not None:
        return None, f"the server's half made {path} infinite or not a number of it"
    return state, None


# ------------------------------------------------------------------------ plain figures
def row_fault(row: Any, rank: Any, labels: Sequence[str], *, strict: bool = True) -> str | None:
    """A clause on what is wrong with how a client describes itself, or None.

    Its number of examples becomes a weight, its name a key, and all of it a line of
    ``federation.json``. ``strict``: nothing but what a site may tell.
    """
    from fedgrove.ground.names import client_name

    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str):
        return "it does not say who it is"
    if client_name(row["name"]) != row["name"]:
        return "its name is none for a client"
    if not _count(row.get("train")) or row["train"] < 1:
        return f"it says that it has {str(row.get('train'))[:20]} examples to train on"
    if rank is not None and (not _count(rank) or rank < 1):
        return f"it affords the rank {str(rank)[:20]}"
    if not strict:
        return None
    counts = row.get("labels", {})
    if (
        not isinstance(counts, Mapping)
        or not set(counts) <= set(labels)
        or not all(map(_count, counts.values()))
    ):
        return "its labels are not those of the job with a number for each"
    for key, value in row.items():
        if key in ("name", "labels"):
            continue
        if key in ("train", "test", "validation"):
            fine = _count(value)
        elif key in ("group", "held_out"):
            fine = (
                value is None
                or isinstance(value, bool)
                or (isinstance(value, str) and len(value) <= LONGEST_TEXT)
            )
        else:
            fine = len(key) <= LONGEST_TEXT and _number(value)
        if not fine:
            return f"{key[:LONGEST_TEXT]!r} of its description is none"
    return None


def measures_fault(found: Any, *, needed: set[str], known: set[str] | None = None) -> str | None:
    """A clause on what is wrong with a client's measures, or None. ``needed``: must be there;
    ``known``: may be there.

    None, and NaN for what could not be measured, pass in place of a number where ``known`` says
    which keys there are.
    """
    if not isinstance(found, Mapping) or not needed <= set(found):
        return f"they have no {', '.join(sorted(needed - set(found if isinstance(found, Mapping) else ())))}"
    for key, value in found.items():
        if known is not None and key not in known:
            return f"{key[:LONGEST_TEXT]!r} is no measure"
        if known is None and (
            key in ("round", "client", "split") or not key.isidentifier() or len(key) > 40
        ):
            return f"{key[:LONGEST_TEXT]!r} is no measure"
        if not (_number(value) or (value is None and known is not None)):
            return f"{key} is no number"
    return f"they are {len(found)}" if len(found) > 20 else None


def figures_fault(**figures: Any) -> str | None:
    """A clause on the first figure that is no number from 0 to ``MOST``, or None."""
    for name, value in figures.items():
        if not _number(value) or not 0 <= value <= MOST:
            return f"{name} is no usable number"
    return None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST


def _number(value: Any) -> bool:
    """A number that can be written down: no truth value, and no integer that is too large for a
    float.
    """
    if isinstance(value, bool) or not isinstance(value, float | int):
        return False
    return isinstance(value, float) or abs(value) <= MOST


# ------------------------------------------------------------------------ the rules
def _fault(tree: Any, sites: Sites | None, rank: int | None) -> str | None:
    tree = plain(tree)
    for number, (path, value, site) in enumerate(_walk(tree, sites or {}, "")):
        if number == MOST_LEAVES:
            return f"it has more than {MOST_LEAVES:,} parts"
        wrong = _value_fault(value, path) or (site and _site_fault(value, path, site, rank))
        if wrong:
            return wrong
    return _names_fault(tree, sites, "") if sites else None


def _walk(
    node: Any, sites: Sites, path: str, site: Site | None = None
) -> Iterator[tuple[str, Any, Site | None]]:
    """Every leaf with its path and the adapted layer it belongs to."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _walk(
                value, sites, f"{path}/{key}" if path else str(key), sites.get(key, site)
            )
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, sites, f"{path}/{index}", site)
    else:
        yield path, node, site


def _value_fault(value: Any, path: str) -> str | None:
    if isinstance(value, Factors):
        for letter in ("A", "B"):
            if wrong := _value_fault(getattr(value, letter), f"{path}.{letter}"):
                return wrong
        return None if math.isfinite(value.scale) else f"the scale of {path} is {value.scale}"
    if isinstance(value, Tensor):
        if is_private(value):
            return f"{path} is marked as private to a client"
        if value.dtype.is_floating_point:
            if value.dtype not in DTYPES:
                return f"{path} is {_dtype(value)}, not float32"
            if not bool(torch.isfinite(value).all()):
                return f"{path} holds numbers that are not finite"
            largest = float(value.abs().max()) if value.numel() else 0.0
            return (
                None
                if largest <= LARGEST
                else f"{path} holds the number {largest:.2g}, above {LARGEST:g}"
            )
        return (
            None
            if value.dtype == torch.int64
            else f"{path} is {_dtype(value)}, not float32 or int64"
        )
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path} is {value}"
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{path} is a text of {len(value)} characters"
    return None


def _site_fault(value: Any, path: str, site: Site, rank: int | None) -> str | None:
    most = rank if rank is not None else min(site.in_features, site.out_features)
    if isinstance(value, Factors):
        if value.A.ndim != 2 or value.B.ndim != 2 or value.A.shape[0] != value.B.shape[1]:
            return f"{path} has A of the shape {_shape(value.A)} and B of {_shape(value.B)}, which do not fit"
        for letter, tensor, side in (("A", value.A, 1), ("B", value.B, 0)):
            wanted = site.in_features if letter == "A" else site.out_features
            if tensor.shape[side] != wanted:
                return f"{letter} of {path} has the shape {_shape(tensor)}, but that layer has {wanted} features there"
        return None if value.rank <= most else f"{path} has the rank {value.rank}, above {most}"
    if isinstance(value, Tensor) and value.ndim == 2:
        long = {site.in_features, site.out_features}
        fits = [
            other
            for side, other in ((value.shape[0], value.shape[1]), (value.shape[1], value.shape[0]))
            if side in long
        ]
        if not fits:
            return f"{path} has the shape {_shape(value)}, but that layer is {site.out_features} by {site.in_features}"
        if min(fits) > max(most, EXPERTS):
            return f"{path} has the shape {_shape(value)}, with more than {max(most, EXPERTS)} on the short side"
        return None
    if isinstance(value, Tensor) and value.ndim == 1:
        longest = max(most, EXPERTS)
        return (
            None
            if value.numel() <= longest
            else f"{path} has {value.numel()} numbers, above {longest}"
        )
    if isinstance(value, Tensor) and value.ndim > 2:
        return f"{path} has {value.ndim} dimensions"
    return None


def _names_fault(node: Any, sites: Sites, path: str) -> str | None:
    """A table that names adapted layers names nothing else."""
    children: dict[Any, Any] = dict(enumerate(node)) if isinstance(node, list) else {}
    if isinstance(node, Mapping):
        children = dict(node)
        if any(key in sites for key in node) or any(
            isinstance(value, Factors) for value in node.values()
        ):
            unknown = [key for key in node if key not in sites]
            if unknown:
                return f"{path}/{unknown[0]} is no adapted layer of the base model"
    for key, value in children.items():
        if wrong := _names_fault(value, sites, f"{path}/{key}" if path else str(key)):
            return wrong
    return None


def _head_fault(head: Any, initial: Mapping[str, Tensor]) -> str | None:
    if not isinstance(head, Mapping) or set(head) != set(initial):
        return "its head does not have the parts of the federation's"
    for name, tensor in head.items():
        if not isinstance(tensor, Tensor) or tensor.shape != initial[name].shape:
            return f"head/{name} does not have the shape {_shape(initial[name])}"
    return None


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "of a single number"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
