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
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import (
    Indices,
    check,
    concat,
    index_mean,
    index_shares,
    norm,
    positions,
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
    norms = [norm(subtract_products(previous, start)) for start in starts]
    sites = list(dict.fromkeys(site for each in norms for site in each))
    return _noise(
        {site: math.fsum(each.get(site, 0.0) for each in norms) / len(norms) for site in sites}
    )


def aggregation_noise(
    new: Adapter, ends: Sequence[Adapter], weights: Sequence[float] | None = None
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
    return _noise(norm(subtract_products(new, ideal)))


def index_aggregation_noise(
    new: Adapter,
    previous: Adapter,
    modules: Sequence[Adapter],
    indices: Sequence[Indices] | None = None,
    weights: Sequence[float] | None = None,
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
        held, rows, parts = _held(site, old, modules, indices, weights)
        untouched = torch.ones(old.rank, dtype=torch.bool)
        for row in rows:
            untouched[row] = False
        wide = old.map(Tensor.double)
        a, b = [wide.A[untouched]], [wide.B[:, untouched] * old.scale]
        for part, factors in zip(parts, held, strict=True):
            a.append(factors.A.double())
            b.append(factors.B.double() * (part * factors.scale))
        ideal[site] = Factors(torch.cat(a, 0), torch.cat(b, 1), 1.0)
    return _noise(norm(subtract_products(widen(new), ideal)))


def noise_bound(
    previous: Adapter,
    modules: Sequence[Adapter],
    indices: Sequence[Indices] | None = None,
    weights: Sequence[float] | None = None,
) -> Noise:
    """The true bound on ``N_agg`` of a per-index mean of factors, per site (arguments as in
    ``index_mean``).

    ``s sum_j sum_{i in Q_j} p_ij ||B_{i,(j)} - mean B_(j)|| ||A_{i,(j)} - mean A_(j)||`` with
    ``p_ij = 1 / |Q_j|`` for uniform weights. The paper prints the sum of the deviations instead of
    their products, which is no bound.
    """
    means = index_mean([widen(module) for module in modules], indices, widen(previous), weights)
    sites: dict[str, float] = {}
    for site, old in previous.items():
        held, rows, parts = _held(site, old, modules, indices, weights)
        total = 0.0
        for part, row, factors in zip(parts, rows, held, strict=True):
            off_a = torch.linalg.norm(factors.A.double() - means[site].A[row], dim=1)
            off_b = torch.linalg.norm(factors.B.double() - means[site].B[:, row], dim=0)
            total += float((part * off_a * off_b).sum())
        sites[site] = abs(old.scale) * total
    return _noise(sites)


def index_cosines(
    modules: Sequence[Adapter], rank: int, indices: Sequence[Indices] | None = None
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
        a, b, index, client = [], [], [], []
        for number, module in enumerate(modules):
            row = positions(site, module[site], None if indices is None else indices[number], rank)
            a.append(module[site].A.double())
            b.append(module[site].B.double().T)
            index.append(row)
            client.append(torch.full_like(row, number))
        result[site] = _cosines(
            torch.cat(a), torch.cat(b), torch.cat(index), torch.cat(client), rank
        )
    return result


def _cosines(a: Tensor, b: Tensor, index: Tensor, client: Tensor, rank: int) -> Cosines:
    length_a, length_b = a.norm(dim=1), b.norm(dim=1)
    there = (length_a > 0) & (length_b > 0)
    a, b = a[there] / length_a[there, None], b[there] / length_b[there, None]
    index, client = index[there.cpu()], client[there.cpu()]
    pairs = client[:, None] != client[None, :]
    cosine = ((a @ a.T) * (b @ b.T)).cpu() * pairs
    hot = torch.nn.functional.one_hot(index, rank).double()
    sums, counts = hot.T @ cosine @ hot, hot.T @ pairs.double() @ hot
    on, all_on = float(sums.diagonal().sum()), float(counts.diagonal().sum())
    off, all_off = float(sums.sum()) - on, float(counts.sum()) - all_on
    return Cosines(
        matrix=sums / counts,  # 0 / 0 is NaN: no pair
        same=on / all_on if all_on else None,
        other=off / all_off if all_off else None,
    )


def _held(
    site: str,
    old: Factors,
    modules: Sequence[Adapter],
    indices: Sequence[Indices] | None,
    weights: Sequence[float] | None,
) -> tuple[list[Factors], list[Tensor], list[Tensor]]:
    """The clients' modules of one site, their global indices, and their shares among each index's
    holders.
    """
    held = [module[site] for module in modules]
    if indices is not None and len(indices) != len(modules):
        raise AdapterError(
            f"{len(indices)} lists of rank indices for {len(modules)} adapters: give one for each."
        )
    rows = [
        positions(site, factors, None if indices is None else indices[number], old.rank)
        for number, factors in enumerate(held)
    ]
    return held, rows, index_shares(rows, weights, old.rank)


def _noise(sites: dict[str, float]) -> Noise:
    return Noise(sites, math.sqrt(math.fsum(value * value for value in sites.values())))
