"""Subspaces spanned by ``B`` and distances between clients. Distance matrices are float64 [N, N],
zero diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Sites
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.seeds import generator

#: Columns of one GEMM block of ``principal_angle_distances``: bounds its memory at N = 1000 to
#: about 200 MB.
_BLOCK = 2048
_SKETCH = 256  # numbers of a client's sketch in ``rough_angles``
_CLIENTS = 500  # that are sketched at a time

Square = Float[Tensor, "N N"]  # of all pairs
Basis = Float[Tensor, "out _"]  # orthonormal columns, as many as the basis has


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
    most = min(B.shape[-2:])
    if not 1 <= rank <= most:
        shape = list(B.shape)
        raise AdapterError(f"A basis of rank {rank} does not exist in B {shape}: use 1..{most}.")
    finite = torch.isfinite(B)
    if not bool(finite.all()):
        raise AdapterError("B holds NaN or Inf: leave this client out or lower its learning rate.")
    found = torch.linalg.svd(B.double(), full_matrices=False)
    left: Tensor = found.U[..., :rank]
    return left.to(B.dtype)


def overlap(U: Tensor, V: Tensor) -> float:
    """``||U^T V||^2``, the sum of squared cosines of the principal angles between two orthonormal
    bases [out, r].
    """
    cosines = U.double().T @ V.double()
    return float(cosines.square().sum())


def frobenius_distances(matrices: Sequence[Tensor]) -> Square:
    """``||M_i - M_j||`` for all pairs, [N, N]; the matrices have one shape. AdapterError where not.

    One Gram matrix of the centred matrices in float64; pairs so close that it would cancel are
    subtracted directly, so near-duplicates keep their digits and duplicates are at distance 0.
    """
    rows = _rows(matrices)
    rows = rows - rows.mean(0)
    gram = rows @ rows.T
    lengths = gram.diagonal()
    square = lengths[:, None] + lengths[None, :]
    distance = square - 2 * gram
    lost = distance <= 1e-8 * square
    for i, row in enumerate(rows):
        later = torch.nonzero(lost[i, i + 1 :])
        close = later.flatten() + i + 1
        apart = rows[close] - row
        distance[i, close] = apart.square().sum(1)
    above = distance.triu(1)
    both = above + above.T
    return both.clamp_min(0).sqrt()


def cosine_distances(matrices: Sequence[Tensor]) -> Square:
    """``1 - cos(M_i, M_j)`` of the flattened matrices, in [0, 2]; a zero matrix is at 1 from all
    others, zeros at 0.
    """
    rows = _rows(matrices)
    lengths = rows.norm(dim=1, keepdim=True)
    divisors = torch.where(lengths > 0, lengths, 1.0)
    unit = rows / divisors
    # ||x - y||^2 / 2 = 1 - cos for unit vectors, and does not cancel for near-duplicates.
    apart = frobenius_distances(list(unit))
    distance = apart.square() / 2
    zero = lengths.flatten() == 0
    one_is_zero = zero[:, None] != zero[None, :]
    one = torch.ones_like(distance)
    found = torch.where(one_is_zero, one, distance)
    return found.clamp(0, 2)


def principal_angle_distances(bases: Sequence[Basis]) -> Square:
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
    device = bases[0].device
    ranks = torch.tensor([each.shape[1] for each in bases], device=device)
    cosines = _squared_cosines(bases, ranks)
    above = cosines.triu(1)
    both = above + above.T
    of_row = ranks[:, None]
    of_column = ranks[None, :]
    smaller = torch.minimum(of_row, of_column)
    distance = 1 - both / smaller
    return distance.clamp(0, 1).fill_diagonal_(0)


def rough_angles(
    clients: Sequence[Tensor],
    landmarks: Sequence[int],
    site: str,
) -> Float[Tensor, "N M"]:
    """``principal_angle_distances`` from N clients to M of them at one site, float32, on sketches.

    With Gaussian g, h the number ``g^T P h`` of a projector ``P = U U^T`` has
    ``E[(g^T P h)(g^T Q h)] = tr(P Q) = ||U^T V||^2``; 256 of them are a client's sketch, so that of
    rank r a distance has a standard error of about 1/16, and the mean over a model's sites a
    smaller one. A direction that B lacks counts as at right angles to all.

    Args:
        clients: B [out, r_i] of each; no basis of it is needed.
    """
    out = clients[0].shape[0]
    draw = generator(0, "angles", site)
    left, right = torch.randn(2, out, _SKETCH, generator=draw)
    sketch = torch.zeros(len(clients), _SKETCH)
    ranks = torch.tensor([min(B.shape) for B in clients])
    shapes = [B.shape for B in clients]
    for shape in dict.fromkeys(shapes):
        alike = [n for n, each in enumerate(shapes) if each == shape]
        for start in range(0, len(alike), _CLIENTS):
            rows = alike[start : start + _CLIENTS]
            B = torch.stack([clients[n] for n in rows]).float()
            root = _inverse_root(B)
            first = left.T @ B @ root
            second = right.T @ B @ root
            sketch[rows] = (first * second).sum(2) / _SKETCH**0.5
    chosen = list(landmarks)
    smaller = torch.minimum(ranks[:, None], ranks[chosen][None, :])
    cosines = (sketch @ sketch[chosen].T) / smaller
    return (1 - cosines).clamp_(0, 1)


def _inverse_root(B: Float[Tensor, "n out r"]) -> Float[Tensor, "n r r"]:
    """``W`` with ``B W`` orthonormal, or zero where B has no such direction; float32."""
    wide = B.double()
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    largest = values.amax(1, keepdim=True)
    there = values > 1e-10 * largest
    inverse = torch.where(there, values, 1.0).rsqrt() * there
    return (vectors * inverse[:, None, :]).float()


def _squared_cosines(
    bases: Sequence[Basis],
    ranks: Int[Tensor, " N"],
) -> Square:
    """``||U_i^T U_j||^2`` for ``i <= j``, float64; below the diagonal not all of them."""
    count = len(bases)
    stacked = torch.cat([each.double() for each in bases], 1)
    ends = torch.cumsum(ranks, 0)
    starts = [0, *ends.tolist()]
    numbers = torch.arange(count, device=ranks.device)
    owner = torch.repeat_interleave(numbers, ranks)
    cosines = stacked.new_zeros(count, count)
    first = 0
    while first < count:
        last = first + 1
        start = starts[first]
        while last < count and starts[last + 1] - start <= _BLOCK:
            last += 1
        end = starts[last]
        block = stacked[:, start:end]
        square = (block.T @ stacked[:, start:]).square_()
        columns = stacked.new_zeros(len(square), count)
        columns.index_add_(1, owner[start:], square)
        cosines.index_add_(0, owner[start:end], columns)
        first = last
    return cosines


def bases(adapter: Adapter) -> dict[str, Tensor]:
    """The ``basis`` of every site's B, ``{site: [out, rank]}`` in float64."""
    found: dict[str, Tensor] = {}
    for site, factors in adapter.items():
        found[site] = basis(factors.B.double())
    return found


def overlap_by_layer(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    sites: Sites,
) -> list[float]:
    """Mean squared cosine of the principal angles between two sets of bases: one number per layer,
    shallow to deep.

    ``||U^T V||^2 / min(r, r')`` of bases [out, r], averaged over the layer's sites; two random
    subspaces of rank r in ``out`` dimensions have ``r / out``.
    """
    layers: dict[int, list[float]] = {}
    for name, site in sites.items():
        U = first[name]
        V = second[name]
        smaller = min(U.shape[1], V.shape[1])
        share = overlap(U, V) / smaller
        layers.setdefault(site.layer, []).append(share)
    means: list[float] = []
    for _, shares in sorted(layers.items()):
        total = math.fsum(shares)
        means.append(total / len(shares))
    return means


def orthogonal_projector_penalty(
    B_frozen: Float[Tensor, "out frozen"],
    B: Float[Tensor, "out rank"],
) -> Float[Tensor, ""]:
    """``||B_frozen^T B||^2`` as a differentiable scalar: HiLoRA's penalty between tiers, for one
    site.

    With orthonormal columns in ``B_frozen`` [out, r] it is the squared norm of B's projection on
    their span; orthonormalise (``basis``) first where the columns are not.
    """
    inner = B_frozen.T @ B
    return inner.square().sum()


def _rows(matrices: Sequence[Tensor]) -> Float[Tensor, "N numbers"]:
    """Each matrix as a row, in float64. They have one shape, whatever it is."""
    if not matrices:
        raise AdapterError("There is no matrix to compare: give at least one.")
    wanted = matrices[0].shape
    rows: list[Tensor] = []
    for number, matrix in enumerate(matrices):
        if matrix.shape != wanted:
            raise AdapterError(
                f"Matrix {number} is {list(matrix.shape)} and the first {list(wanted)}: "
                "this distance needs equal shapes (equal ranks)."
            )
        finite = torch.isfinite(matrix)
        if not bool(finite.all()):
            raise AdapterError(
                f"Matrix {number} holds NaN or Inf: leave this client out or lower its learning "
                f"rate."
            )
        wide = matrix.detach().double()
        rows.append(wide.flatten())
    return torch.stack(rows)
