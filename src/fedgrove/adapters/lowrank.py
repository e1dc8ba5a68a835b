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
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import Weights, check, shares
from fedgrove.adapters.centre import shares_of, weighed
from fedgrove.ground.errors import AdapterError

#: Where the singular values go: into A (HiLoRA), into B, or their square roots into both.
Split = Literal["left", "right", "balanced"]
Triplets = tuple[Tensor, Tensor, Tensor]  # U [out, r], S [r] descending, Vh [r, in]


def product_svd(
    factors: Sequence[Factors],
    weights: Weights = None,
    rank: int | None = None,
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
    dtypes: list[torch.dtype] = []
    for each in factors:
        dtypes += [each.A.dtype, each.B.dtype]
    dtype = reduce(torch.promote_types, dtypes)
    if weights is None:
        weights = [1.0] * len(factors)
    u, s, vh = _svd("(this site)", factors, weights, rank)
    return u.to(dtype), s.to(dtype), vh.to(dtype)


def product_mean(
    adapters: Sequence[Adapter],
    weights: Weights,
    rank: int | None,
    scale: float,
    split: Split = "balanced",
) -> Adapter:
    """``truncated`` at every site of whole adapters; AdapterError where they do not fit together."""
    check(adapters)
    parts = shares_of(adapters, shares(weights, len(adapters)))
    result: Adapter = {}
    with weighed():
        for site in adapters[0]:
            factors = [adapter[site] for adapter in adapters]
            result[site] = truncated(
                factors,
                parts,
                rank,
                scale,
                split,
                site=site,
            )
    return result


def truncated(
    factors: Sequence[Factors],
    weights: Weights,
    rank: int | None,
    scale: float,
    split: Split = "balanced",
    start: Float[Tensor, "rows in"] | None = None,
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
    parts = shares_of([{site: each} for each in factors], shares(weights, len(factors)))
    triplets = _svd(site, factors, parts, rank)
    return _factors(
        triplets,
        factors[0],
        scale,
        split,
        rank,
        start,
    )


def leading(
    factors: Factors,
    rank: int,
    scale: float,
    split: Split = "balanced",
) -> Factors:
    """The first ``rank`` modules of an SVD in factors, for a recipient of scale ``scale``.

    The change of scale goes where the singular values are; of a module whose B is zero, A stays as
    it is, since that is what it starts from. What does not change is a view: clients that run the
    same frozen factors then share them in memory, and a cohort multiplies by them once.
    """
    A = factors.A[:rank]
    B = factors.B[:, :rank]
    change = factors.scale / scale
    if change == 1:
        return Factors(A, B, scale)
    if split == "left":
        return Factors(A * change, B, scale)
    if split == "right":
        return Factors(A, B * change, scale)
    root = math.sqrt(change)
    begun = B.any(0)
    begun_rows = begun[:, None]
    A = torch.where(begun_rows, A * root, A)
    return Factors(A, B * root, scale)


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
        alive = _alive((u, s, vh))
        kept = max(1, int(alive.sum()))
        if factors.rank <= kept:
            result[site] = factors
            continue
        scale = factors.scale
        if scale <= 0:
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
    site: str,
    factors: Sequence[Factors],
    weights: Sequence[float],
    rank: int | None,
) -> Triplets:
    if rank is not None and rank < 1:
        raise AdapterError(f"Rank {rank} must be at least 1.")
    count = len(factors)
    finite = all(map(math.isfinite, weights))
    if len(weights) != count or not finite:
        raise AdapterError(
            f"Weights {list(weights)} for {count} adapters: give one finite weight for each."
        )
    a, b = _stacked(factors, weights)
    # Zero columns up to the wanted rank: Householder QR then completes Q to that many orthonormal
    # columns.
    missing = (rank or 0) - a.shape[0]
    if missing > 0:
        a = pad(a, (0, 0, 0, missing))
        b = pad(b, (0, missing))
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    core = r_b @ r_a.T
    try:
        left, s, right = torch.linalg.svd(core, full_matrices=False)
    except RuntimeError as error:
        raise AdapterError(
            f"Site '{site}': the SVD of the mean update does not converge: check its values."
        ) from error
    u = q_b @ left[:, :rank]
    vh = right[:rank] @ q_a.T
    return _signed(u, s[:rank], vh)


def _stacked(
    factors: Sequence[Factors],
    weights: Sequence[float],
) -> tuple[Float[Tensor, "ranks in"], Float[Tensor, "out ranks"]]:
    """The A's on top of each other and the weighted ``s B`` side by side, in float64."""
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for weight, each in zip(weights, factors, strict=True):
        factor = weight * each.scale
        rows.append(each.A.double())
        columns.append(each.B.double() * factor)
    a = torch.cat(rows, 0)
    b = torch.cat(columns, 1)
    return a, b


def _signed(
    u: Float[Tensor, "out r"],
    s: Float[Tensor, " r"],
    vh: Float[Tensor, "r in"],
) -> Triplets:
    """The triplets with the largest entry of each left vector positive."""
    if not s.numel():
        return u, s, vh
    largest = u.abs().argmax(0, keepdim=True)
    sign = torch.sign(u.gather(0, largest))
    return u * sign, s, vh * sign.T


def _alive(triplets: Triplets) -> Bool[Tensor, " r"]:
    """Which directions are more than float64's rounding of the largest: bool [r]."""
    u, s, vh = triplets
    largest = s[:1].sum()
    longest = max(u.shape[0], vh.shape[1])
    noise = largest * longest * torch.finfo(torch.float64).eps
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
        a = s[:, None] * vh
        b = u
    elif split == "right":
        a = vh
        b = u * s
    elif split == "balanced":
        root = s.sqrt()
        a = root[:, None] * vh
        b = u * root
        if not bool(alive.all()):
            dead = torch.nonzero(~alive).flatten().tolist()
            a[dead] = _starts(dead, vh, start)
            b[:, dead] = 0.0
    else:
        raise AdapterError(f"Split '{split}' is unknown: use 'left', 'right' or 'balanced'.")
    beyond = range(len(s), rank or 0)
    if beyond:
        more = _starts(beyond, vh, start)
        a = torch.cat([a, more])
        b = pad(b, (0, len(beyond)))
    return Factors(
        A=a.to(like.A.dtype),
        B=b.to(like.B.dtype),
        scale=scale,
    )


def _starts(
    numbers: Sequence[int],
    vh: Float[Tensor, "r in"],
    start: Float[Tensor, "rows in"] | None,
) -> Float[Tensor, "numbers in"]:
    """Rows of A for dead directions of these numbers, float64 [numbers, in]; ``vh`` [r, in]."""
    rows: list[Tensor] = []
    for number in numbers:
        if start is not None and number < len(start):
            row = start[number].to(vh)
        else:
            direction = vh[number % len(vh)]
            row = 3**-0.5 * direction
        rows.append(row)
    return torch.stack(rows)
