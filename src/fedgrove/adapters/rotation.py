"""FedRot-LoRA's rotation of rank spaces (2602.23638): clients turn their modules to common
directions before a mean.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.adapter import Factors
from fedgrove.ground.errors import AdapterError

Square = Float[Tensor, "r r"]


def rotation(M: Square, lam: float = 0.5) -> Square:
    """The soft rotation R [r, r] for the alignment matrix ``M = A_ref A_i^T`` (or ``B_ref^T B_i``),
    in float64.

    ``M = U S V^T``, ``R* = V diag(1, .., det(U V^T)) U^T``, ``R = proj_SO((1 - lam) I + lam R*)``.
    ``lam = 0`` is the identity, 1 the full Procrustes rotation; M = 0 (nothing to align with) is
    the identity. AdapterError unless
    ``0 <= lam <= 1``.
    """
    if not 0 <= lam <= 1:
        raise AdapterError(f"The rotation strength is {lam}: give a number in 0..1.")
    identity = torch.eye(
        len(M),
        dtype=torch.float64,
        device=M.device,
    )
    full = _to_rotation(M.double().T)
    between = (1 - lam) * identity + lam * full
    return _to_rotation(between)


def align(
    factors: Factors,
    reference: Factors,
    factor: Literal["A", "B"],
    lam: float = 0.5,
) -> Factors:
    """``(R^T A, B R)``, rotated towards the reference's ``factor``; the product ``B A`` does not
    change.

    Raises AdapterError for unequal ranks.
    """
    if factors.rank != reference.rank:
        raise AdapterError(
            f"Rank {factors.rank} cannot be aligned with rank {reference.rank}: use one rank for "
            f"all."
        )
    A = factors.A.double()
    B = factors.B.double()
    if factor == "A":
        wanted = reference.A.double()
        M = wanted @ A.T
    elif factor == "B":
        wanted = reference.B.double()
        M = wanted.T @ B
    else:
        raise AdapterError(f"Factor '{factor}' cannot be aligned: use 'A' or 'B'.")
    R = rotation(M, lam)
    turned_A = R.T @ A
    turned_B = B @ R
    return Factors(
        A=turned_A.to(factors.A.dtype),
        B=turned_B.to(factors.B.dtype),
        scale=factors.scale,
    )


def _to_rotation(X: Square) -> Square:
    """The rotation nearest to X (Kabsch): ``P diag(1, .., det(P Q^T)) Q^T`` from ``X = P S
    Q^T``.
    """
    P: Tensor
    Qh: Tensor
    P, _, Qh = torch.linalg.svd(X)
    handedness = torch.linalg.det(P @ Qh)
    sign = X.new_ones(len(X))
    sign[-1] = torch.sign(handedness)
    return (P * sign) @ Qh
