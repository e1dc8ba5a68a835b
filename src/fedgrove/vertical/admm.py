"""The arithmetic of VIM, pure tensors.

Xie, Chen, Zhang, Li and Li, "Improving Privacy-Preserving Vertical Federated Learning by Efficient
Communication with ADMM" (SaTML 2024, arXiv 2207.10226). Party k has q_k, its share of the logits, and
s is the sum of all shares:

    min Σ_j ℓ(z_j, y_j)   subject to   z = s,   with multipliers λ.

Shapes: b entities of a batch, c classes, h the width of a party's embedding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

STEPS = 50  # of Newton; 12 do for rho of .01 and more
_TOLERANCE = 1e-12  # of the gradient's largest entry, beside 1
_HALVINGS = 40
_ENOUGH = 1e-4  # of the decrease that the slope promises (Armijo)


def nearest(
    sums: Float[Tensor, "b c"],
    duals: Float[Tensor, "b c"],
    labels: Int[Tensor, " b"],
    rho: float,
) -> Float[Tensor, "b c"]:
    """``z = argmin ℓ(z, y) − λᵀz + ρ/2 ‖s − z‖²`` of each row, ℓ the cross-entropy; float64.

    Damped Newton: the Hessian is ``diag p − p pᵀ + ρ I``, whose inverse Sherman and Morrison give
    without a matrix. Undamped it can cycle.
    """
    sums = sums.double()
    duals = duals.double()
    wanted = F.one_hot(labels, sums.shape[1]).double()
    z = sums.clone()
    for _ in range(STEPS):
        p = z.softmax(-1)
        slope = p - wanted - duals + rho * (z - sums)
        if float(slope.abs().max()) <= _TOLERANCE:
            break
        direction = _solved(p, slope, rho)
        z = _damped(z, direction, slope, sums=sums, duals=duals, wanted=wanted, rho=rho)
    return z


def _solved(
    p: Float[Tensor, "b c"],
    slope: Float[Tensor, "b c"],
    rho: float,
) -> Float[Tensor, "b c"]:
    """``(diag p − p pᵀ + ρ I)⁻¹ slope``, row by row."""
    diagonal = p + rho
    plain = slope / diagonal
    # 1 − pᵀ diag(p + ρ)⁻¹ p, written so that nothing cancels
    rest = (p * rho / diagonal).sum(-1, keepdim=True)
    along = (p * plain).sum(-1, keepdim=True)
    return plain + p / diagonal * (along / rest)


def _damped(
    z: Float[Tensor, "b c"],
    direction: Float[Tensor, "b c"],
    slope: Float[Tensor, "b c"],
    *,
    sums: Float[Tensor, "b c"],
    duals: Float[Tensor, "b c"],
    wanted: Float[Tensor, "b c"],
    rho: float,
) -> Float[Tensor, "b c"]:
    """One Newton step of each row, halved until the row's value falls enough."""

    def value(at: Float[Tensor, "b c"]) -> Float[Tensor, " b"]:
        loss = at.logsumexp(-1) - (at * (wanted + duals)).sum(-1)
        return loss + rho / 2 * (sums - at).square().sum(-1)

    before = value(z)
    promised = (slope * direction).sum(-1)
    length = torch.ones_like(before)
    # a row that no halving lowers any more is at its minimum up to rounding
    rounding = 1e-14 * before.abs().clamp(min=1)
    for _ in range(_HALVINGS):
        found = z - length[:, None] * direction
        high = value(found) > before - _ENOUGH * length * promised + rounding
        if not bool(high.any()):
            return found
        length = torch.where(high, length / 2, length)
    return z - length[:, None] * direction


def next_duals(
    duals: Float[Tensor, "b c"],
    sums: Float[Tensor, "b c"],
    z: Float[Tensor, "b c"],
    rho: float,
) -> Float[Tensor, "b c"]:
    """``λ + ρ (s − z)``, which is ``softmax(z) − y`` at the minimum z."""
    return duals + rho * (sums - z)


def objective(
    share: Float[Tensor, "b c"],
    dual: Float[Tensor, "b c"],
    rest: Float[Tensor, "b c"],
    rho: float,
) -> Float[Tensor, ""]:
    """What a party lowers: ``(1/b) Σ [λᵀ q_k + ρ/2 ‖s_{−k} − z + q_k‖²]``; ``rest`` is s_{−k} − z."""
    each = (dual * share).sum(-1) + rho / 2 * (rest + share).square().sum(-1)
    return each.mean()


def damping(
    share: Float[Tensor, "b c"],
    first: Float[Tensor, "b c"],
    weight: float,
) -> Float[Tensor, ""]:
    """``(1/b) Σ weight/2 ‖q_k − first‖²``: with weight ``(K − 1) ρ`` the K parties' steps at the same
    time do not overshoot together.
    """
    return weight / 2 * (share - first).square().sum(-1).mean()
