"""Truncated SVD of a weighted sum of low-rank products, by the QR trick: never a dense ``[out,
in]`` matrix.

``sum_i w_i s_i B_i A_i = B A`` with B's side by side and A's stacked; ``B = Q_B R_B`` and ``A^T =
Q_A R_A`` leave the SVD of the core ``R_B R_A^T``, of the size of the summed ranks. All of it runs
in float64, whatever the input (float32 loses the small singular values of badly scaled clients and
saves only half the time), and returns in the input's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import check, shares
from fedgrove.ground.errors import AdapterError

#: Where the singular values go: into A (HiLoRA), into B, or their square roots into both.
Split = Literal["left", "right", "balanced"]
Triplets = tuple[Tensor, Tensor, Tensor]  # U [out, r], S [r] descending, Vh [r, in]


def product_svd(
    factors: Sequence[Factors], weights: Sequence[float] | None = None, rank: int | None = None
) -> Triplets:
    """Largest singular triplets of ``sum_i w_i s_i B_i A_i``: U [out, r], S [r] descending, Vh [r,
    in].

    ``weights`` are taken as they are (not normalised; None is 1 each). ``r = min(rank, out, in)``,
    and without ``rank``
    ``r = min(sum of ranks, out, in)``. U and Vh are always orthonormal: a rank beyond that of the
    sum is completed with zero singular values. Signs are fixed by making the largest entry of each
    left vector positive; within a repeated singular value only the subspace is defined. Raises
    AdapterError for clashing shapes, NaN or Inf.
    """
    check([{"(this site)": each} for each in factors])
    dtype = reduce(
        torch.promote_types, (tensor.dtype for each in factors for tensor in (each.A, each.B))
    )
    if weights is None:
        weights = [1.0] * len(factors)
    u, s, vh = _svd("(this site)", factors, weights, rank)
    return u.to(dtype), s.to(dtype), vh.to(dtype)


def product_mean(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    rank: int | None,
    scale: float,
    split: Split = "balanced",
) -> Adapter:
    """``truncated`` at every site of whole adapters; AdapterError where they do not fit together."""
    check(adapters)
    result: Adapter = {}
    for site in adapters[0]:
        factors = [adapter[site] for adapter in adapters]
        result[site] = truncated(factors, weights, rank, scale, split, site=site)
    return result


def truncated(
    factors: Sequence[Factors],
    weights: Sequence[float] | None,
    rank: int | None,
    scale: float,
    split: Split = "balanced",
    start: Tensor | None = None,
    site: str = "(this site)",
) -> Factors:
    """The best rank-``rank`` approximation of ``sum_i p_i s_i B_i A_i`` for a recipient of a scale.

    Args:
        factors: the clients'; ranks and scales may differ.
        weights: normalised to ``p_i``; None is uniform.
        rank: of the result; None keeps every direction (``min(sum of ranks, out, in)``): then the
            mean is exact.
        scale: the recipient's ``s > 0``. The products are divided by it, so that ``scale * B @ A``
            is the mean.
        split: "left" B = U, A = S Vh / s (HiLoRA 2603.02785); "right" B = U S / s, A = Vh;
            "balanced" the square root of S / s in both.
        start: [rows, in], what a dead direction starts from (see ``_factors``).
        site: its name, for messages.

    AdapterError for input that does not fit together.
    """
    check([{site: each} for each in factors])
    if not (math.isfinite(scale) and scale > 0):
        raise AdapterError(f"Scale {scale} must be finite and > 0.")
    parts = shares(weights, len(factors))
    triplets = _svd(site, factors, parts, rank)
    return _factors(triplets, factors[0], scale, split, rank, start)


def leading(factors: Factors, rank: int, scale: float, split: Split = "balanced") -> Factors:
    """The first ``rank`` modules of an SVD in factors, for a recipient of scale ``scale``.

    The change of scale goes where the singular values are; of a module whose B is zero, A stays as
    it is, since that is what it starts from. What does not change is a view: clients that run the
    same frozen factors then share them in memory, and a cohort multiplies by them once.
    """
    A, B = factors.A[:rank], factors.B[:, :rank]
    change = factors.scale / scale
    if change == 1:
        return Factors(A, B, scale)
    if split == "left":
        return Factors(A * change, B, scale)
    if split == "right":
        return Factors(A, B * change, scale)
    root = math.sqrt(change)
    begun = B.any(0)
    return Factors(torch.where(begun[:, None], A * root, A), B * root, scale)


def compact(adapter: Adapter, rank: int | None = None) -> Adapter:
    """The same update with the fewest modules: at most ``min(out, in)`` (or ``rank``, then the best
    approximation).

    Directions below float64 rounding of the largest are dropped; at least one module stays. Scales
    are kept, and the singular values are split evenly over A and B. A site that cannot shrink is
    returned untouched.
    """
    check([adapter])
    result: Adapter = {}
    for site, factors in adapter.items():
        u, s, vh = _svd(site, [factors], [1.0], rank)
        kept = max(1, int(_alive((u, s, vh)).sum()))
        if factors.rank <= kept:
            result[site] = factors
        else:
            if factors.scale > 0:
                scale = factors.scale
            else:
                scale = 1.0
            triplets = u[:, :kept], s[:kept], vh[:kept]
            result[site] = _factors(triplets, factors, scale, "balanced")
    return result


def lean(adapter: Adapter) -> Adapter:
    """The same update with no site of more modules than ``min(out, in)``: others are compacted."""
    result: Adapter = {}
    for site, factors in adapter.items():
        full = min(factors.B.shape[0], factors.A.shape[1])
        if factors.rank <= full:
            result[site] = factors
        else:
            result |= compact({site: factors})
    return result


def _svd(
    site: str, factors: Sequence[Factors], weights: Sequence[float], rank: int | None
) -> Triplets:
    if rank is not None and rank < 1:
        raise AdapterError(f"Rank {rank} must be at least 1.")
    if len(weights) != len(factors) or not all(math.isfinite(weight) for weight in weights):
        raise AdapterError(
            f"Weights {list(weights)} for {len(factors)} adapters: give one finite weight for each."
        )
    a = torch.cat([each.A.double() for each in factors], 0)
    b = torch.cat(
        [
            each.B.double() * (weight * each.scale)
            for weight, each in zip(weights, factors, strict=True)
        ],
        1,
    )
    # Zero columns up to the wanted rank: Householder QR then completes Q to that many orthonormal
    # columns.
    missing = (rank or 0) - a.shape[0]
    if missing > 0:
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        b = torch.nn.functional.pad(b, (0, missing))
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    try:
        left, s, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    except RuntimeError as error:
        raise AdapterError(
            f"Site '{site}': the SVD of the mean update does not converge: check its values."
        ) from error
    left, s, right = left[:, :rank], s[:rank], right[:rank]
    u, vh = q_b @ left, right @ q_a.T
    if s.numel():
        sign = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
        u, vh = u * sign, vh * sign.T
    return u, s, vh


def _alive(triplets: Triplets) -> Tensor:
    """Which directions are more than float64's rounding of the largest: bool [r]."""
    u, s, vh = triplets
    noise = s[:1].sum() * max(u.shape[0], vh.shape[1]) * torch.finfo(torch.float64).eps
    return s > noise


def _factors(
    triplets: Triplets,
    like: Factors,
    scale: float,
    split: Split,
    rank: int | None = None,
    start: Tensor | None = None,
) -> Factors:
    """Singular triplets (U [out, r], S [r], Vh [r, in]) as factors of a scale, in ``like``'s dtypes.

    A direction that the update does not have would be zero in both factors of a balanced split,
    and so would modules beyond ``min(out, in)``: no gradient could move them. Each gets a zero B,
    and for A the row of ``start`` [rows, in] with its number; without one, a row of the length that
    PEFT's random ones have.
    """
    u, s, vh = triplets
    alive = _alive(triplets)
    s = s / scale
    if split == "left":
        a, b = s[:, None] * vh, u
    elif split == "right":
        a, b = vh, u * s
    elif split == "balanced":
        a, b = s.sqrt()[:, None] * vh, u * s.sqrt()
        if not bool(alive.all()):
            dead = torch.nonzero(~alive).flatten().tolist()
            a[dead], b[:, dead] = _starts(dead, vh, start), 0.0
    else:
        raise AdapterError(f"Split '{split}' is unknown: use 'left', 'right' or 'balanced'.")
    beyond = range(len(s), rank or 0)
    if beyond:
        a = torch.cat([a, _starts(beyond, vh, start)])
        b = torch.nn.functional.pad(b, (0, len(beyond)))
    return Factors(a.to(like.A.dtype), b.to(like.B.dtype), scale)


def _starts(numbers: Sequence[int], vh: Tensor, start: Tensor | None) -> Tensor:
    """Rows of A for dead directions of these numbers, float64 [numbers, in]; ``vh`` [r, in]."""
    rows = []
    for number in numbers:
        if start is not None and number < len(start):
            rows.append(start[number].to(vh))
        else:
            rows.append(3**-0.5 * vh[number % len(vh)])
    return torch.stack(rows)
