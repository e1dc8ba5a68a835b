"""The noise analysis of heterogeneous ranks (Fed-PLoRA, 2602.16936), for any method, without a
dense product.

``N_init = mean_i ||G_{t-1} - M_i||``: what a client loses on its way down. ``N_agg = ||G_t -
ideal||``: what the server loses against the mean of the clients' *products*. Pass effective updates
against the original base weights: a method with a base delta concatenates it to G, M_i and D_i
alike. Totals over sites are root-sum-squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import (
    Indices,
    Weights,
    check,
    concat,
    each_of,
    index_mean,
    index_shares,
    norm,
    positions,
    root_sum_square,
    shares,
    subtract_products,
    widen,
)
from fedgrove.ground.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Noise:
    """One quantity per site (Frobenius norm of an effective update) and its root-sum-square over
    the sites.
    """

    sites: dict[str, float]
    total: float


@dataclass(frozen=True, slots=True, eq=False)
class Cosines:
    """Cosine similarity between different clients' modules, as matrices ``b a^T``; zero modules are
    left out.

    ``matrix`` [R, R], float64: entry ``j, j'`` is the mean over pairs of different clients that
    hold ``j`` and ``j'`` (NaN where there is no pair). ``same`` and ``other`` are the means over
    all pairs of equal and of different indices, None where there is no pair.
    """

    matrix: Tensor
    same: float | None
    other: float | None


def initial_noise(previous: Adapter, starts: Sequence[Adapter]) -> Noise:
    """``mean_i ||G_{t-1} - M_i||`` per site.

    Args:
        previous: ``G_{t-1}``, the effective global update before the round.
        starts: ``M_i``, the effective update each client starts from.

    Exactly 0 where every start holds the same modules as ``previous``, in any order. For FLoRA's
    adapter-space reading pass the stacked adapter and fresh (zero) starts.
    """
    if not starts:
        raise AdapterError(
            "There is no start to compare with the global update: give at least one."
        )
    norms = []
    for start in starts:
        lost = subtract_products(previous, start)
        norms.append(norm(lost))
    sites: dict[str, None] = {}
    for each in norms:
        sites.update(dict.fromkeys(each))
    means: dict[str, float] = {}
    for site in sites:
        total = math.fsum(each.get(site, 0.0) for each in norms)
        means[site] = total / len(norms)
    return _noise(means)


def aggregation_noise(
    new: Adapter,
    ends: Sequence[Adapter],
    weights: Weights = None,
) -> Noise:
    """``||G_t - sum_i p_i D_i||`` per site.

    Args:
        new: ``G_t``, the effective global update after aggregation.
        ends: ``D_i``, the effective update each client ends with.
        weights: the method's own, normalised to ``p_i``; None is uniform.
    """
    parts = shares(weights, len(ends))
    if len(ends) > 1:
        ideal = concat([widen(end) for end in ends], parts)
    else:
        ideal = ends[0]
    lost = subtract_products(new, ideal)
    return _noise(norm(lost))


def index_aggregation_noise(
    new: Adapter,
    previous: Adapter,
    modules: Sequence[Adapter],
    indices: Sequence[Indices] | None = None,
    weights: Weights = None,
) -> Noise:
    """``||G_t - ideal||`` per site for rules that average by rank index (Fed-PLoRA, raFLoRA).

    The ideal is ``s sum_j mean_{i in Q_j} B_{i,(j)} A_{i,(j)}`` over the indices trained this
    round, and the others as they are in ``previous``. Arguments as in ``index_mean``; ``new`` is
    ``G_t`` and may have any rank.
    """
    check([previous, *modules])
    shares(weights, len(modules))
    ideal: Adapter = {}
    for site, old in previous.items():
        held, rows, parts = _held(
            site,
            old,
            modules,
            indices,
            weights,
        )
        untouched = torch.ones(old.rank, dtype=torch.bool)
        for row in rows:
            untouched[row] = False
        wide = old.map(Tensor.double)
        kept = wide.B[:, untouched]
        a = [wide.A[untouched]]
        b = [kept * old.scale]
        for part, factors in zip(parts, held, strict=True):
            weight = part * factors.scale
            a.append(factors.A.double())
            b.append(factors.B.double() * weight)
        ideal[site] = Factors(
            A=torch.cat(a, 0),
            B=torch.cat(b, 1),
            scale=1.0,
        )
    lost = subtract_products(widen(new), ideal)
    return _noise(norm(lost))


def noise_bound(
    previous: Adapter,
    modules: Sequence[Adapter],
    indices: Sequence[Indices] | None = None,
    weights: Weights = None,
) -> Noise:
    """The true bound on ``N_agg`` of a per-index mean of factors, per site (arguments as in
    ``index_mean``).

    ``s sum_j sum_{i in Q_j} p_ij ||B_{i,(j)} - mean B_(j)|| ||A_{i,(j)} - mean A_(j)||`` with
    ``p_ij = 1 / |Q_j|`` for uniform weights. The paper prints the sum of the deviations instead of
    their products, which is no bound.
    """
    wide = [widen(module) for module in modules]
    means = index_mean(wide, indices, widen(previous), weights)
    sites: dict[str, float] = {}
    for site, old in previous.items():
        held, rows, parts = _held(
            site,
            old,
            modules,
            indices,
            weights,
        )
        mean = means[site]
        total = 0.0
        for part, row, factors in zip(parts, rows, held, strict=True):
            apart_a = factors.A.double() - mean.A[row]
            apart_b = factors.B.double() - mean.B[:, row]
            off_a = torch.linalg.norm(apart_a, dim=1)
            off_b = torch.linalg.norm(apart_b, dim=0)
            bound = part * off_a * off_b
            total += float(bound.sum())
        sites[site] = abs(old.scale) * total
    return _noise(sites)


def index_cosines(
    modules: Sequence[Adapter],
    rank: int,
    indices: Sequence[Indices] | None = None,
) -> dict[str, Cosines]:
    """Similarity of modules of the same and of different index between clients, per site (the
    paper's heat map).

    Args:
        modules: per client, the modules it holds.
        rank: R, the number of global rank indices.
        indices: per client, the global index of each row; None is the first ``r_i``.

    The cosine of ``b a^T`` and ``b' a'^T`` is ``cos(b, b') cos(a, a')``. Memory: the square of the
    number of modules.
    """
    check(modules)
    result: dict[str, Cosines] = {}
    for site in modules[0]:
        held = [module[site] for module in modules]
        rows = _positions(site, held, indices, rank)
        clients = [torch.full_like(row, number) for number, row in enumerate(rows)]
        a = [factors.A.double() for factors in held]
        b = [factors.B.double().T for factors in held]
        result[site] = _cosines(
            torch.cat(a),
            torch.cat(b),
            torch.cat(rows),
            torch.cat(clients),
            rank,
        )
    return result


def _cosines(
    a: Float[Tensor, "m in"],
    b: Float[Tensor, "m out"],
    index: Int[Tensor, " m"],
    client: Int[Tensor, " m"],
    rank: int,
) -> Cosines:
    """Of all clients' modules at one site: their index and client are those of each row."""
    length_a = a.norm(dim=1)
    length_b = b.norm(dim=1)
    there = (length_a > 0) & (length_b > 0)
    unit_a = a[there] / length_a[there, None]
    unit_b = b[there] / length_b[there, None]
    kept = there.cpu()
    index = index[kept]
    client = client[kept]
    pairs = client[:, None] != client[None, :]
    cosine_a = unit_a @ unit_a.T
    cosine_b = unit_b @ unit_b.T
    cosine = (cosine_a * cosine_b).cpu() * pairs
    return _by_index(cosine, pairs, index, rank)


def _by_index(
    cosine: Float[Tensor, "m m"],
    pairs: Bool[Tensor, "m m"],
    index: Int[Tensor, " m"],
    rank: int,
) -> Cosines:
    """The means over the pairs; ``cosine`` is 0 where there is none."""
    hot = torch.nn.functional.one_hot(index, rank).double()
    sums = hot.T @ cosine @ hot
    counts = hot.T @ pairs.double() @ hot
    on = float(sums.diagonal().sum())
    all_on = float(counts.diagonal().sum())
    off = float(sums.sum()) - on
    all_off = float(counts.sum()) - all_on
    return Cosines(
        matrix=sums / counts,  # 0 / 0 is NaN: no pair
        same=_mean(on, all_on),
        other=_mean(off, all_off),
    )


def _mean(total: float, count: float) -> float | None:
    if not count:
        return None
    return total / count


def _held(
    site: str,
    old: Factors,
    modules: Sequence[Adapter],
    indices: Sequence[Indices] | None,
    weights: Weights,
) -> tuple[list[Factors], list[Tensor], list[Tensor]]:
    """The clients' modules of one site, their global indices, and their shares among each index's
    holders: both [r_i].
    """
    held = [module[site] for module in modules]
    rows = _positions(site, held, indices, old.rank)
    parts = index_shares(rows, weights, old.rank)
    return held, rows, parts


def _positions(
    site: str,
    held: Sequence[Factors],
    indices: Sequence[Indices] | None,
    rank: int,
) -> list[Tensor]:
    """``positions`` [r_i] of each client's modules of one site."""
    wanted = each_of(indices, len(held))
    rows: list[Tensor] = []
    for factors, each in zip(held, wanted, strict=True):
        row = positions(site, factors, each, rank)
        rows.append(row)
    return rows


def _noise(sites: dict[str, float]) -> Noise:
    total = root_sum_square(sites.values())
    return Noise(sites, total)
