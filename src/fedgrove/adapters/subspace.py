"""Subspaces spanned by ``B`` and distances between clients. Distance matrices are float64 [N, N],
zero diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Site
from fedgrove.ground.errors import AdapterError

#: Columns of one GEMM block of ``principal_angle_distances``: bounds its memory at N = 1000 to
#: about 200 MB.
_BLOCK = 2048


def basis(B: Tensor, rank: int | None = None) -> Tensor:
    """Orthonormal basis of B's ``rank`` leading left singular directions (default: as many as B has
    columns).

    Args:
        B: [..., out, r]; leading axes are a batch.

    Returns [..., out, rank] in B's dtype, computed in float64. Where B's own rank is lower the last
    columns are arbitrary (still orthonormal). Raises AdapterError for a rank that B cannot have,
    NaN or Inf.
    """
    if rank is None:
        rank = B.shape[-1]
    else:
        rank = rank
    if not 1 <= rank <= min(B.shape[-2:]):
        raise AdapterError(
            f"A basis of rank {rank} does not exist in B {list(B.shape)}: use "
            f"1..{min(B.shape[-2:])}."
        )
    if not bool(torch.isfinite(B).all()):
        raise AdapterError("B holds NaN or Inf: leave this client out or lower its learning rate.")
    left: Tensor = torch.linalg.svd(B.double(), full_matrices=False).U
    return left[..., :rank].to(B.dtype)


def overlap(U: Tensor, V: Tensor) -> float:
    """``||U^T V||^2``, the sum of squared cosines of the principal angles between two orthonormal
    bases [out, r].
    """
    return float((U.double().T @ V.double()).square().sum())


def frobenius_distances(matrices: Sequence[Tensor]) -> Tensor:
    """``||M_i - M_j||`` for all pairs; the matrices have one shape. AdapterError where they do not.

    One Gram matrix of the centred matrices in float64; pairs so close that it would cancel are
    subtracted directly, so near-duplicates keep their digits and duplicates are at distance 0.
    """
    rows = _rows(matrices)
    rows = rows - rows.mean(0)
    gram = rows @ rows.T
    square = gram.diagonal()[:, None] + gram.diagonal()[None, :]
    distance = square - 2 * gram
    for i in range(len(rows)):
        close = i + 1 + torch.nonzero(distance[i, i + 1 :] <= 1e-8 * square[i, i + 1 :]).flatten()
        distance[i, close] = (rows[close] - rows[i]).square().sum(1)
    distance = distance.triu(1)
    return (distance + distance.T).clamp_min(0).sqrt()


def cosine_distances(matrices: Sequence[Tensor]) -> Tensor:
    """``1 - cos(M_i, M_j)`` of the flattened matrices, in [0, 2]; a zero matrix is at 1 from all
    others, zeros at 0.
    """
    rows = _rows(matrices)
    lengths = rows.norm(dim=1, keepdim=True)
    unit = rows / torch.where(lengths > 0, lengths, 1.0)
    # ||x - y||^2 / 2 = 1 - cos for unit vectors, and does not cancel for near-duplicates.
    distance = frobenius_distances(list(unit)).square() / 2
    zero = lengths.flatten() == 0
    return torch.where(zero[:, None] != zero[None, :], torch.ones_like(distance), distance).clamp(
        0, 2
    )


def principal_angle_distances(bases: Sequence[Tensor]) -> Tensor:
    """``d_ij = 1 - ||U_i^T U_j||^2 / min(r_i, r_j)`` (HiLoRA 2603.02785), in [0, 1].

    Args:
        bases: orthonormal [out, r_i], from ``basis``; ranks may differ.

    Blocked GEMM in float64, upper triangle only. Raises AdapterError for different ``out``.
    """
    if not bases:
        raise AdapterError("There is no basis to compare: give at least one.")
    outs = sorted({each.shape[0] for each in bases})
    if len(outs) > 1:
        raise AdapterError(
            f"Bases live in spaces of {outs} dimensions: compare one site at a time."
        )
    ranks = torch.tensor([each.shape[1] for each in bases], device=bases[0].device)
    stacked = torch.cat([each.double() for each in bases], 1)
    starts = [0, *torch.cumsum(ranks, 0).tolist()]
    owner = torch.repeat_interleave(torch.arange(len(bases), device=ranks.device), ranks)
    cosines = torch.zeros(len(bases), len(bases), dtype=torch.float64, device=stacked.device)
    first = 0
    while first < len(bases):
        last = first + 1
        while last < len(bases) and starts[last + 1] - starts[first] <= _BLOCK:
            last += 1
        square = (
            stacked[:, starts[first] : starts[last]].T @ stacked[:, starts[first] :]
        ).square_()
        columns = torch.zeros(len(square), len(bases), dtype=torch.float64, device=stacked.device)
        columns.index_add_(1, owner[starts[first] :], square)
        cosines.index_add_(0, owner[starts[first] : starts[last]], columns)
        first = last
    cosines = cosines.triu(1)
    smaller = torch.minimum(ranks[:, None], ranks[None, :])
    distance = (1 - (cosines + cosines.T) / smaller).clamp(0, 1)
    return distance.fill_diagonal_(0)


def bases(adapter: Adapter) -> dict[str, Tensor]:
    """The ``basis`` of every site's B, in float64."""
    return {site: basis(factors.B.double()) for site, factors in adapter.items()}


def overlap_by_layer(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], sites: Mapping[str, Site]
) -> list[float]:
    """Mean squared cosine of the principal angles between two sets of bases: one number per layer,
    shallow to deep.

    ``||U^T V||^2 / min(r, r')``, averaged over the layer's sites; two random subspaces of rank r in
    ``out`` dimensions have ``r / out``.
    """
    layers: dict[int, list[float]] = {}
    for name, site in sites.items():
        smaller = min(first[name].shape[1], second[name].shape[1])
        layers.setdefault(site.layer, []).append(overlap(first[name], second[name]) / smaller)
    return [math.fsum(layers[layer]) / len(layers[layer]) for layer in sorted(layers)]


def orthogonal_projector_penalty(B_frozen: Tensor, B: Tensor) -> Tensor:
    """``||B_frozen^T B||^2`` as a differentiable scalar: HiLoRA's penalty between tiers, for one
    site.

    With orthonormal columns in ``B_frozen`` [out, r] it is the squared norm of B's projection on
    their span; orthonormalise (``basis``) first where the columns are not.
    """
    return (B_frozen.T @ B).square().sum()


def _rows(matrices: Sequence[Tensor]) -> Tensor:
    if not matrices:
        raise AdapterError("There is no matrix to compare: give at least one.")
    for number, matrix in enumerate(matrices):
        if matrix.shape != matrices[0].shape:
            raise AdapterError(
                f"Matrix {number} is {list(matrix.shape)} and the first {list(matrices[0].shape)}: "
                f"this distance needs "
                "equal shapes (equal ranks)."
            )
        if not bool(torch.isfinite(matrix).all()):
            raise AdapterError(
                f"Matrix {number} holds NaN or Inf: leave this client out or lower its learning "
                f"rate."
            )
    return torch.stack([matrix.detach().double().flatten() for matrix in matrices])
