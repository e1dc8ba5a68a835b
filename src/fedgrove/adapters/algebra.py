"""Exact algebra on adapters: factor means, concatenation, rank-1 modules, norms of products.

Every function treats the sites one by one, so a caller may pass a whole adapter or one site at a
time. No dense
``[out, in]`` product is ever formed. A *module* is one rank index of a site: column ``B[:, j]`` and
row ``A[j]``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.ground.errors import AdapterError

#: The rank indices of some modules, ascending: the same for every site, or one list per site.
Indices = Sequence[int] | Mapping[str, Sequence[int]]


def check(adapters: Sequence[Adapter], names: Sequence[str] | None = None) -> None:
    """Refuse adapters that cannot be combined: other sites, other in/out features, broken factors,
    NaN or Inf.

    Ranks and scales may differ. ``names`` are the clients' names for the message (default ``adapter
    0``, ...). Raises AdapterError naming the adapter and the site.
    """
    if not adapters:
        raise AdapterError("There is no adapter to combine: give at least one.")
    first = adapters[0]
    for number, adapter in enumerate(adapters):
        who = names[number] if names is not None else f"adapter {number}"
        if odd := sorted(first.keys() ^ adapter.keys()):
            has = "lacks" if odd[0] in first else "has an extra"
            raise AdapterError(
                f"{who} {has} site '{odd[0]}': give every client the same target modules."
            )
        for site, factors in adapter.items():
            a, b = factors.A, factors.B
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise AdapterError(
                    f"{who}, site '{site}': A {list(a.shape)} and B {list(b.shape)} are no pair "
                    f"[r, in], [out, r]: "
                    "export this adapter again."
                )
            if not math.isfinite(factors.scale):
                raise AdapterError(
                    f"{who}, site '{site}': scale is {factors.scale}: give a finite alpha and rank."
                )
            if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
                raise AdapterError(
                    f"{who}, site '{site}' holds NaN or Inf: leave this client out or lower its lr."
                )
            _same_shape(site, first[site], factors, who)


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """``p_i = w_i / sum(w)``; None is uniform. AdapterError unless there are ``count`` finite
    weights >= 0, one > 0.
    """
    if weights is None:
        weights = [1.0] * count
    values = [float(weight) for weight in weights]
    if len(values) != count or count == 0:
        raise AdapterError(f"{len(values)} weights for {count} adapters: give one weight for each.")
    if any(not math.isfinite(value) or value < 0 for value in values) or not math.fsum(values) > 0:
        raise AdapterError(f"Weights {values} must be finite, not negative and not all zero.")
    if (
        len(set(values)) == 1
    ):  # 1/49, 49 times, adds up to less than 1: even weights however they are written
        return [1.0 / count] * count
    total = math.fsum(values)
    return [value / total for value in values]


def mean(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """FedIT's rule (2305.05644): the weighted mean of the A's and, separately, of the B's.

    ``weights`` are normalised; None is uniform. Sums run in float64, results have the input's
    dtype. Raises AdapterError where ranks or scales differ: the rule is undefined there.
    """
    check(adapters)
    parts = shares(weights, len(adapters))
    result: Adapter = {}
    for site, first in adapters[0].items():
        _equal_ranks(site, [adapter[site] for adapter in adapters])
        _equal_scales(site, [adapter[site] for adapter in adapters])
        a, b = (
            torch.zeros_like(first.A, dtype=torch.float64),
            torch.zeros_like(first.B, dtype=torch.float64),
        )
        for part, adapter in zip(parts, adapters, strict=True):
            a += part * adapter[site].A.double()
            b += part * adapter[site].B.double()
        result[site] = Factors(a.to(first.A.dtype), b.to(first.B.dtype), first.scale)
    return result


def index_mean(
    modules: Sequence[Adapter],
    indices: Sequence[Indices] | None,
    previous: Adapter,
    weights: Sequence[float] | None = None,
) -> Adapter:
    """The mean of every rank index over the clients that hold it (Fed-PLoRA, 2602.16936); the
    others stay.

    Args:
        modules: per client, an adapter of the modules it trained, row ``n`` of A being global index
            ``indices[i][n]``.
        indices: per client, ascending; None means that client ``i`` holds the first ``r_i``.
        previous: the last global adapter, rank R: the value of an index that nobody holds.
        weights: normalised over the holders of each index; None is uniform.

    With every client holding all R indices this is ``mean``, bit for bit. AdapterError for unequal
    scales or an index outside ``0..R-1``.
    """
    check(
        [previous, *modules],
        ["the previous adapter", *(f"adapter {number}" for number in range(len(modules)))],
    )
    shares(weights, len(modules))
    result: Adapter = {}
    for site, old in previous.items():
        held = [module[site] for module in modules]
        _equal_scales(site, [old, *held])
        rows = [
            positions(site, *each, most=old.rank)
            for each in zip(held, _each(indices, len(held)), strict=True)
        ]
        parts = index_shares(rows, weights, old.rank)
        touched = torch.zeros(old.rank, dtype=torch.bool)
        a, b = (
            torch.zeros_like(old.A, dtype=torch.float64),
            torch.zeros_like(old.B, dtype=torch.float64),
        )
        for part, row, factors in zip(parts, rows, held, strict=True):
            a[row] += part[:, None] * factors.A.double()
            b[:, row] += part * factors.B.double()
            touched[row] = True
        keep = touched.to(old.A.device)
        result[site] = Factors(
            torch.where(keep[:, None], a.to(old.A.dtype), old.A),
            torch.where(keep, b.to(old.B.dtype), old.B),
            old.scale,
        )
    return result


def index_shares(
    rows: Sequence[Tensor], weights: Sequence[float] | None, rank: int
) -> list[Tensor]:
    """Per client and held index ``j``, its share among the holders ``Q_j`` (float64, one tensor
    [r_i] per client).

    An index whose holders all have weight 0 is shared evenly among them.
    """
    raw = [1.0] * len(rows) if weights is None else [float(weight) for weight in weights]
    totals = torch.zeros(rank, dtype=torch.float64)
    holders = torch.zeros(rank, dtype=torch.float64)
    for weight, row in zip(raw, rows, strict=True):
        totals[row] += weight
        holders[row] += 1.0
    return [
        torch.where(
            totals[row] > 0, torch.full_like(totals[row], weight) / totals[row], 1.0 / holders[row]
        )
        for weight, row in zip(raw, rows, strict=True)
    ]


def concat(
    adapters: Sequence[Adapter], coefficients: Sequence[float | Mapping[str, float]] | None = None
) -> Adapter:
    """One adapter whose product is exactly ``sum_i c_i s_i B_i A_i``: A's stacked, ``[c_i s_i
    B_i]`` side by side.

    The scale of the result is 1. A coefficient is a number or ``{site: number}`` (default 1). Sites
    may differ: a site that an adapter lacks counts as zero there. AdapterError for clashing shapes
    or a missing coefficient.
    """
    if not adapters:
        raise AdapterError("There is no adapter to concatenate: give at least one.")
    factors = [1.0] * len(adapters) if coefficients is None else list(coefficients)
    if len(factors) != len(adapters):
        raise AdapterError(
            f"{len(factors)} coefficients for {len(adapters)} adapters: give one for each."
        )
    result: Adapter = {}
    for site in dict.fromkeys(site for adapter in adapters for site in adapter):
        first = next(adapter[site] for adapter in adapters if site in adapter)
        rows, columns = [], []
        for number, (factor, adapter) in enumerate(zip(factors, adapters, strict=True)):
            if site not in adapter:
                continue
            _same_shape(site, first, adapter[site], f"adapter {number}")
            if isinstance(factor, Mapping):
                if site not in factor:
                    raise AdapterError(
                        f"adapter {number} has no coefficient for site '{site}': give one per site."
                    )
                factor = factor[site]
            rows.append(adapter[site].A)
            columns.append(_fold(adapter[site], factor))
        result[site] = Factors(torch.cat(rows, 0), torch.cat(columns, 1), 1.0)
    return result


def rescale(adapter: Adapter, scale: float) -> Adapter:
    """The same update at another scale: ``B <- B * s_i / scale`` (``rescale = "B"``). AdapterError
    unless scale > 0.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise AdapterError(f"Scale {scale} must be finite and > 0.")
    return {
        site: factors
        if factors.scale == scale
        else Factors(factors.A, _fold(factors, 1.0 / scale), scale)
        for site, factors in adapter.items()
    }


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """The first ``rank`` modules of every site (all of them where it has fewer); scale
    unchanged.
    """
    _positive(rank)
    return {
        site: Factors(factors.A[:rank].clone(), factors.B[:, :rank].clone(), factors.scale)
        for site, factors in adapter.items()
    }


def pad(adapter: Adapter, rank: int) -> Adapter:
    """Zero modules appended up to ``rank``; scale and product unchanged. AdapterError where a site
    has more already.
    """
    _positive(rank)
    result: Adapter = {}
    for site, factors in adapter.items():
        more = rank - factors.rank
        if more < 0:
            raise AdapterError(
                f"Site '{site}' has rank {factors.rank}, more than {rank}: truncate it first."
            )
        result[site] = Factors(
            torch.nn.functional.pad(factors.A, (0, 0, 0, more)),
            torch.nn.functional.pad(factors.B, (0, more)),
            factors.scale,
        )
    return result


def select(adapter: Adapter, indices: Indices) -> Adapter:
    """The modules ``indices`` alone, scale unchanged.

    AdapterError unless the indices are distinct, ascending and below the rank: row ``n`` of the
    result is then always the ``n``-th index given, which is what an upload's tags say.
    """
    result: Adapter = {}
    for site, factors in adapter.items():
        row = _ascending(site, _at(indices, site), factors.rank)
        result[site] = Factors(factors.A[row], factors.B[:, row], factors.scale)
    return result


def split(adapter: Adapter, indices: Indices) -> tuple[Adapter, Adapter]:
    """``(select(adapter, indices), the rest)``: their products add up to the adapter's; the rest
    may have rank 0.
    """
    others: dict[str, list[int]] = {}
    for site, factors in adapter.items():
        chosen = set(_at(indices, site))
        others[site] = [index for index in range(factors.rank) if index not in chosen]
    return select(adapter, indices), select(adapter, others)


def subtract_products(a: Adapter, b: Adapter) -> Adapter:
    """Factors of ``s_a B_a A_a - s_b B_b A_b`` in float64, scale 1; a site that one of them lacks
    counts as zero.

    Modules that both hold, and zero modules, cancel exactly: equal updates leave rank 0, whatever
    the order of their modules, and whether or not the scale has been folded into B (as ``concat``
    does).
    """
    wide = concat([widen(a), widen(b)], [1.0, -1.0])
    result: Adapter = {}
    for site, factors in wide.items():
        left = _keys(a[site]) if site in a else []
        right = _keys(b[site]) if site in b else []
        # A zero module is keyed None and belongs nowhere; a common one is dropped as often as both
        # sides hold it.
        common = Counter(left) & Counter(right)
        keep = _unmatched(left, common.copy()) + _unmatched(right, common.copy())
        row = torch.tensor([n for n, kept in enumerate(keep) if kept], dtype=torch.long)
        result[site] = Factors(factors.A[row], factors.B[:, row], 1.0)
    return result


def widen(adapter: Adapter) -> Adapter:
    """The same adapter in float64."""
    return {site: factors.map(Tensor.double) for site, factors in adapter.items()}


def norm(adapter: Adapter) -> dict[str, float]:
    """``||s B A||`` (Frobenius) of each site, in float64, without the dense product.

    B is reduced by QR rather than by its Gram matrix: a difference of almost equal products is then
    good to 1e-16 of the products, not to 1e-8.
    """
    result: dict[str, float] = {}
    for site, factors in adapter.items():
        triangle = torch.linalg.qr(factors.B.double(), mode="r").R
        result[site] = abs(factors.scale) * float(torch.linalg.norm(triangle @ factors.A.double()))
    return result


def product_norm(adapter: Adapter) -> float:
    """The norm of the whole update: root of the sum over sites of ``norm(adapter)[site] ** 2``."""
    return math.sqrt(math.fsum(value * value for value in norm(adapter).values()))


def positions(site: str, factors: Factors, indices: Indices | None, most: int) -> Tensor:
    """The global rank indices of a client's rows, long [r_i]; None: the first ``r_i``. AdapterError
    if they misfit.
    """
    wanted = range(factors.rank) if indices is None else _at(indices, site)
    row = _ascending(site, wanted, most)
    if len(row) != factors.rank:
        raise AdapterError(
            f"Site '{site}' has {factors.rank} modules but {len(row)} rank indices: tag each row "
            f"once."
        )
    return row


def _each(indices: Sequence[Indices] | None, count: int) -> Sequence[Indices | None]:
    if indices is None:
        return [None] * count
    if len(indices) != count:
        raise AdapterError(
            f"{len(indices)} lists of rank indices for {count} adapters: give one for each."
        )
    return indices


def _at(indices: Indices, site: str) -> Sequence[int]:
    if not isinstance(indices, Mapping):
        return indices
    if site not in indices:
        raise AdapterError(
            f"There are no rank indices for site '{site}': give them for every site."
        )
    return indices[site]


def _ascending(site: str, indices: Sequence[int], most: int) -> Tensor:
    values = [int(index) for index in indices]
    if values != sorted(set(values)) or (values and not 0 <= values[0] <= values[-1] < most):
        raise AdapterError(
            f"Rank indices {values} of site '{site}' must be distinct, ascending and in "
            f"0..{most - 1}."
        )
    return torch.tensor(values, dtype=torch.long)


def _fold(factors: Factors, coefficient: float) -> Tensor:
    factor = coefficient * factors.scale
    return factors.B if factor == 1.0 else factors.B * factor


def _keys(factors: Factors) -> list[bytes | None]:
    """One key per module, equal for equal modules (scale folded in the factors' own dtype); None
    for a zero one.
    """
    a, b = (
        factors.A.detach().double().cpu(),
        _fold(factors, 1.0).detach().double().cpu().T.contiguous(),
    )
    zero = ~((a != 0).any(1) & (b != 0).any(1))
    return [
        None if zero[n] else a[n].numpy().tobytes() + b[n].numpy().tobytes()
        for n in range(a.shape[0])
    ]


def _unmatched(keys: Sequence[bytes | None], common: Counter[bytes | None]) -> list[bool]:
    kept = []
    for key in keys:
        shared = key is not None and common[key] > 0
        common[key] -= shared
        kept.append(key is not None and not shared)
    return kept


def _same_shape(site: str, first: Factors, other: Factors, who: str) -> None:
    wanted, given = (first.B.shape[0], first.A.shape[1]), (other.B.shape[0], other.A.shape[1])
    if wanted != given:
        raise AdapterError(
            f"{who}, site '{site}' is [out {given[0]}, in {given[1]}] but the first is [out "
            f"{wanted[0]}, "
            f"in {wanted[1]}]: use the same base model everywhere."
        )


def _equal_ranks(site: str, factors: Sequence[Factors]) -> None:
    ranks = sorted({each.rank for each in factors})
    if len(ranks) > 1:
        raise AdapterError(
            f"Site '{site}' has ranks {ranks}: a mean of factors needs equal ranks (pad or "
            f"truncate)."
        )


def _equal_scales(site: str, factors: Sequence[Factors]) -> None:
    scales = sorted({each.scale for each in factors})
    if len(scales) > 1:
        raise AdapterError(
            f"Site '{site}' has scales {scales}: a mean of factors needs equal ones (rescale = "
            f'"B").'
        )


def _positive(rank: int) -> None:
    if rank < 1:
        raise AdapterError(f"Rank {rank} must be at least 1.")
