"""Exact algebra on adapters: factor means, concatenation, rank-1 modules, norms of products.

Every function treats the sites one by one, so a caller may pass a whole adapter or one site at a
time. No dense
``[out, in]`` product is ever formed. A *module* is one rank index of a site: column ``B[:, j]`` and
row ``A[j]``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Dora, Factors
from fedgrove.adapters.centre import active, centred, shares_of
from fedgrove.ground.errors import AdapterError

#: The rank indices of some modules, ascending: the same for every site, or one list per site.
Indices = Sequence[int] | Mapping[str, Sequence[int]]
#: One weight for each adapter; None is uniform.
Weights = Sequence[float] | None


def check(
    adapters: Sequence[Adapter],
    names: Sequence[str] | None = None,
    *,
    dora: bool = False,
) -> None:
    """Refuse adapters that cannot be combined: other sites, other in/out features, broken factors,
    NaN or Inf; those of DoRA too, unless what they are for takes their magnitudes (``dora``).

    Ranks and scales may differ. ``names`` are the clients' names for the message (default ``adapter
    0``, ...). Raises AdapterError naming the adapter and the site.
    """
    if not adapters:
        raise AdapterError("There is no adapter to combine: give at least one.")
    first = adapters[0]
    for number, adapter in enumerate(adapters):
        if names is None:
            who = f"adapter {number}"
        else:
            who = names[number]
        _same_sites(first, adapter, who)
        for site, factors in adapter.items():
            _sound(site, factors, who)
            if isinstance(factors, Dora) and not dora:
                raise AdapterError(
                    f"{who}, site '{site}' has DoRA's magnitudes, which this cannot take: a mean of "
                    f"each tensor (fedit) can."
                )
            _same_shape(site, first[site], factors, who)


def _same_sites(
    first: Adapter,
    other: Adapter,
    who: str,
) -> None:
    odd = first.keys() ^ other.keys()
    if not odd:
        return
    site = min(odd)
    if site in first:
        has = "lacks"
    else:
        has = "has an extra"
    raise AdapterError(f"{who} {has} site '{site}': give every client the same target modules.")


def _sound(
    site: str,
    factors: Factors,
    who: str,
) -> None:
    """Refuses factors that are no pair, or hold what is no number."""
    a = factors.A
    b = factors.B
    tables = a.ndim == b.ndim == 2
    if not tables or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{who}, site '{site}': A {list(a.shape)} and B {list(b.shape)} are no pair "
            f"[r, in], [out, r]: "
            "export this adapter again."
        )
    if not math.isfinite(factors.scale):
        raise AdapterError(
            f"{who}, site '{site}': scale is {factors.scale}: give a finite alpha and rank."
        )
    for factor in factors.tensors.values():
        finite = torch.isfinite(factor)
        if not bool(finite.all()):
            raise AdapterError(
                f"{who}, site '{site}' holds NaN or Inf: leave this client out or lower its lr."
            )


def shares(weights: Weights, count: int) -> list[float]:
    """``p_i = w_i / sum(w)``; None is uniform. AdapterError unless there are ``count`` finite
    weights >= 0, one > 0.
    """
    if weights is None:
        weights = [1.0] * count
    values = [float(weight) for weight in weights]
    found = len(values)
    if found != count or count == 0:
        raise AdapterError(f"{found} weights for {count} adapters: give one weight for each.")
    finite = all(map(math.isfinite, values))
    if not finite or min(values) < 0 or max(values) <= 0:
        raise AdapterError(f"Weights {values} must be finite, not negative and not all zero.")
    if len(set(values)) == 1:
        # 1/49, 49 times, adds up to less than 1: even weights however they are written
        even = 1.0 / count
        return [even] * count
    total = math.fsum(values)
    return [value / total for value in values]


def mean(
    adapters: Sequence[Adapter],
    weights: Weights = None,
) -> Adapter:
    """FedIT's rule (2305.05644): the weighted mean of the A's and, separately, of the B's; of DoRA's
    magnitudes too.

    ``weights`` are normalised; None is uniform. Sums run in float64, results have the input's
    dtype. Raises AdapterError where ranks or scales differ: the rule is undefined there.
    """
    check(adapters, dora=True)
    parts = shares_of(adapters, shares(weights, len(adapters)))
    result: Adapter = {}
    for site in adapters[0]:
        held = [adapter[site] for adapter in adapters]
        _equal_ranks(site, held)
        _equal_scales(site, held)
        result[site] = _middle(held, parts)
    return result


def _middle(held: Sequence[Factors], parts: Sequence[float]) -> Factors:
    """The weighted mean of each tensor of one site."""

    def centre(letter: str, value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        found = centred([each.tensors[letter] for each in held], parts)
        return found.to(value.dtype)

    return held[0].each(centre)


def index_mean(
    modules: Sequence[Adapter],
    indices: Sequence[Indices] | None,
    previous: Adapter,
    weights: Weights = None,
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
    clients = len(modules)
    numbered = [f"adapter {number}" for number in range(clients)]
    check([previous, *modules], ["the previous adapter", *numbered])
    shares(weights, clients)
    given = each_of(indices, clients)
    result: Adapter = {}
    for site, old in previous.items():
        held = [module[site] for module in modules]
        _equal_scales(site, [old, *held])
        rows = []
        for factors, wanted in zip(held, given, strict=True):
            row = positions(site, factors, wanted, old.rank)
            rows.append(row)
        if active() is None:
            result[site] = _index_mean(held, rows, old, weights)
        else:
            result[site] = _defended_indices(held, rows, old, weights)
    return result


def _index_mean(
    held: Sequence[Factors],
    rows: Sequence[Int[Tensor, " _"]],
    old: Factors,
    weights: Weights,
) -> Factors:
    """``index_mean`` of one site; ``rows`` long [r_i], the global rank indices of each client."""
    parts = index_shares(rows, weights, old.rank)
    touched = torch.zeros(old.rank, dtype=torch.bool)
    a = torch.zeros_like(old.A, dtype=torch.float64)
    b = torch.zeros_like(old.B, dtype=torch.float64)
    for part, row, factors in zip(parts, rows, held, strict=True):
        A = factors.A.double()
        B = factors.B.double()
        a[row] += part[:, None] * A
        b[:, row] += part * B
        touched[row] = True
    keep = touched.to(old.A.device)
    a = a.to(old.A.dtype)
    b = b.to(old.B.dtype)
    return Factors(
        A=torch.where(keep[:, None], a, old.A),
        B=torch.where(keep, b, old.B),
        scale=old.scale,
    )


def _defended_indices(
    held: Sequence[Factors],
    rows: Sequence[Int[Tensor, " _"]],
    old: Factors,
    weights: Weights,
) -> Factors:
    """``_index_mean`` under a defence: each index is a group of its own."""
    A = old.A.clone()
    B = old.B.clone()
    for index in range(old.rank):
        modules: list[Adapter] = []
        given: list[float] = []
        for number, (row, factors) in enumerate(zip(rows, held, strict=True)):
            places = (row == index).nonzero().flatten()
            for place in places.tolist():
                modules.append(select({"": factors}, [place]))
                given.append(1.0 if weights is None else float(weights[number]))
        if not modules:
            continue
        if not any(given):
            given = [1.0] * len(given)
        one = mean(modules, given)[""]
        A[index] = one.A[0]
        B[:, index] = one.B[:, 0]
    return Factors(A, B, old.scale)


def index_shares(
    rows: Sequence[Int[Tensor, " _"]],
    weights: Weights,
    rank: int,
) -> list[Float[Tensor, " _"]]:
    """Per client and held index ``j``, its share among the holders ``Q_j`` (float64, one tensor
    [r_i] per client).

    An index whose holders all have weight 0 is shared evenly among them.
    """
    if weights is None:
        weights = [1.0] * len(rows)
    totals = torch.zeros(rank, dtype=torch.float64)
    holders = torch.zeros(rank, dtype=torch.float64)
    for weight, row in zip(weights, rows, strict=True):
        totals[row] += float(weight)
        holders[row] += 1.0
    found = []
    for weight, row in zip(weights, rows, strict=True):
        total = totals[row]
        by_weight = torch.full_like(total, float(weight)) / total
        even = 1.0 / holders[row]
        found.append(torch.where(total > 0, by_weight, even))
    return found


def concat(
    adapters: Sequence[Adapter],
    coefficients: Sequence[float | Mapping[str, float]] | None = None,
) -> Adapter:
    """One adapter whose product is exactly ``sum_i c_i s_i B_i A_i``: A's stacked, ``[c_i s_i
    B_i]`` side by side.

    The scale of the result is 1. A coefficient is a number or ``{site: number}`` (default 1). Sites
    may differ: a site that an adapter lacks counts as zero there. AdapterError for clashing shapes
    or a missing coefficient.
    """
    if not adapters:
        raise AdapterError("There is no adapter to concatenate: give at least one.")
    count = len(adapters)
    if coefficients is None:
        coefficients = [1.0] * count
    given = len(coefficients)
    if given != count:
        raise AdapterError(f"{given} coefficients for {count} adapters: give one for each.")
    leading: Adapter = {}
    for adapter in adapters:
        for site, factors in adapter.items():
            leading.setdefault(site, factors)
    result: Adapter = {}
    for site, first in leading.items():
        rows = []
        columns = []
        for number, adapter in enumerate(adapters):
            if site not in adapter:
                continue
            factors = adapter[site]
            who = f"adapter {number}"
            _same_shape(site, first, factors, who)
            coefficient = _coefficient(coefficients[number], site, who)
            rows.append(factors.A)
            columns.append(_fold(factors, coefficient))
        result[site] = Factors(
            A=torch.cat(rows, 0),
            B=torch.cat(columns, 1),
            scale=1.0,
        )
    return result


def _coefficient(
    given: float | Mapping[str, float],
    site: str,
    who: str,
) -> float:
    if not isinstance(given, Mapping):
        return given
    if site not in given:
        raise AdapterError(f"{who} has no coefficient for site '{site}': give one per site.")
    return given[site]


def rescale(adapter: Adapter, scale: float) -> Adapter:
    """The same update at another scale: ``B <- B * s_i / scale`` (``rescale = "B"``). AdapterError
    unless scale > 0.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise AdapterError(f"Scale {scale} must be finite and > 0.")
    result: Adapter = {}
    for site, factors in adapter.items():
        if factors.scale == scale:
            result[site] = factors
            continue
        B = _fold(factors, 1.0 / scale)
        result[site] = replace(factors, B=B, scale=scale)
    return result


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """The first ``rank`` modules of every site (all of them where it has fewer); scale
    unchanged.
    """
    _positive(rank)
    result: Adapter = {}
    for site, factors in adapter.items():
        A = factors.A[:rank].clone()
        B = factors.B[:, :rank].clone()
        result[site] = Factors(A, B, factors.scale)
    return result


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
        A = torch.nn.functional.pad(factors.A, (0, 0, 0, more))
        B = torch.nn.functional.pad(factors.B, (0, more))
        result[site] = Factors(A, B, factors.scale)
    return result


def select(adapter: Adapter, indices: Indices) -> Adapter:
    """The modules ``indices`` alone, scale unchanged.

    AdapterError unless the indices are distinct, ascending and below the rank: row ``n`` of the
    result is then always the ``n``-th index given, which is what an upload's tags say.
    """
    result: Adapter = {}
    for site, factors in adapter.items():
        chosen = _at(indices, site)
        row = _ascending(site, chosen, factors.rank)
        result[site] = _modules(factors, row)
    return result


def _modules(factors: Factors, row: Int[Tensor, " n"]) -> Factors:
    """The modules of these rank indices."""
    return Factors(
        A=factors.A[row],
        B=factors.B[:, row],
        scale=factors.scale,
    )


def split(adapter: Adapter, indices: Indices) -> tuple[Adapter, Adapter]:
    """``(select(adapter, indices), the rest)``: their products add up to the adapter's; the rest
    may have rank 0.
    """
    others: dict[str, list[int]] = {}
    for site, factors in adapter.items():
        chosen = set(_at(indices, site))
        every = range(factors.rank)
        others[site] = [index for index in every if index not in chosen]
    first = select(adapter, indices)
    second = select(adapter, others)
    return first, second


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
        left = _keys_at(a, site)
        right = _keys_at(b, site)
        # A zero module is keyed None and belongs nowhere; a common one is dropped as often as both
        # sides hold it.
        common = Counter(left) & Counter(right)
        keep = _unmatched(left, common.copy())
        keep += _unmatched(right, common.copy())
        kept = [n for n, keeps in enumerate(keep) if keeps]
        row = torch.tensor(kept, dtype=torch.long)
        result[site] = _modules(factors, row)
    return result


def _keys_at(adapter: Adapter, site: str) -> list[bytes | None]:
    """``_keys`` of the site; none where the adapter lacks it."""
    if site not in adapter:
        return []
    return _keys(adapter[site])


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
        A = factors.A.double()
        B = factors.B.double()
        triangle = torch.linalg.qr(B, mode="r").R
        length = torch.linalg.norm(triangle @ A)
        result[site] = abs(factors.scale) * float(length)
    return result


def product_norm(adapter: Adapter) -> float:
    """The norm of the whole update: root of the sum over sites of ``norm(adapter)[site] ** 2``."""
    norms = norm(adapter)
    return root_sum_square(norms.values())


def root_sum_square(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(math.fsum(squares))


def positions(
    site: str,
    factors: Factors,
    indices: Indices | None,
    most: int,
) -> Int[Tensor, " rank"]:
    """The global rank indices of a client's rows, long [r_i]; None: the first ``r_i``. AdapterError
    if they misfit.
    """
    rank = factors.rank
    wanted: Sequence[int] = range(rank)
    if indices is not None:
        wanted = _at(indices, site)
    row = _ascending(site, wanted, most)
    tags = len(row)
    if tags != rank:
        raise AdapterError(
            f"Site '{site}' has {rank} modules but {tags} rank indices: tag each row once."
        )
    return row


def each_of(indices: Sequence[Indices] | None, count: int) -> Sequence[Indices | None]:
    if indices is None:
        return [None] * count
    lists = len(indices)
    if lists != count:
        raise AdapterError(
            f"{lists} lists of rank indices for {count} adapters: give one for each."
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


def _ascending(
    site: str,
    indices: Sequence[int],
    most: int,
) -> Int[Tensor, " n"]:
    values = [int(index) for index in indices]
    rising = values == sorted(set(values))
    within = all(0 <= value < most for value in values)
    if not (rising and within):
        last = most - 1
        raise AdapterError(
            f"Rank indices {values} of site '{site}' must be distinct, ascending and in 0..{last}."
        )
    return torch.tensor(values, dtype=torch.long)


def _fold(factors: Factors, coefficient: float) -> Float[Tensor, "out rank"]:
    """B with the scale and the coefficient in it."""
    factor = coefficient * factors.scale
    if factor == 1.0:
        return factors.B
    return factors.B * factor


def _keys(factors: Factors) -> list[bytes | None]:
    """One key per module, equal for equal modules (scale folded in the factors' own dtype); None
    for a zero one.
    """
    B = _fold(factors, 1.0)
    a = factors.A.detach().double().cpu()
    b = B.detach().double().cpu().T.contiguous()
    alive = a.any(1) & b.any(1)
    keys: list[bytes | None] = []
    for row, column, lives in zip(a, b, alive, strict=True):
        if lives:
            key = row.numpy().tobytes() + column.numpy().tobytes()
            keys.append(key)
        else:
            keys.append(None)
    return keys


def _unmatched(
    keys: Sequence[bytes | None],
    common: Counter[bytes | None],
) -> list[bool]:
    kept = []
    for key in keys:
        shared = key is not None and common[key] > 0
        common[key] -= shared
        kept.append(key is not None and not shared)
    return kept


def _same_shape(
    site: str,
    first: Factors,
    other: Factors,
    who: str,
) -> None:
    wanted = _sides(first)
    given = _sides(other)
    if wanted != given:
        raise AdapterError(
            f"{who}, site '{site}' is {given} but the first is {wanted}: "
            "use the same base model everywhere."
        )


def _sides(factors: Factors) -> str:
    out = factors.B.shape[0]
    into = factors.A.shape[1]
    kind = ""
    if isinstance(factors, Dora):
        kind = ", with magnitudes"
    return f"[out {out}, in {into}{kind}]"


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
