"""What a mean of factors loses against the mean of products, and two ways to give it back:
FedEx-LoRA and LoRA-FAIR.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import concat, mean, shares, widen
from fedgrove.adapters.lowrank import compact
from fedgrove.ground.errors import AdapterError


def fedex_residual(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """FedEx-LoRA's residual ``sum_i p_i s B_i A_i - s mean(B) mean(A)`` (2410.09432), factored and
    compacted.

    Scale 1, dtype of the input, rank at most ``min(out, in, (N - 1) r)``: added to ``mean(adapters,
    weights)`` it is the exact mean of the products. AdapterError for unequal ranks or scales.
    """
    # The mean before it is rounded to the input's dtype lies in the span of the clients' columns:
    # no rank for rounding.
    wide = [widen(each) for each in adapters]
    stack = concat([*wide, mean(wide, weights)], [*shares(weights, len(adapters)), -1.0])
    # What is left of it is small beside what cancels, so its rank is known and not found from its
    # singular values.
    most = max(1, (len(adapters) - 1) * next(iter(adapters[0].values())).rank)
    exact = compact(stack, most)
    return {
        site: Factors(
            factors.A.to(adapters[0][site].A.dtype),
            factors.B.to(adapters[0][site].B.dtype),
            factors.scale,
        )
        for site, factors in exact.items()
    }


def fair_correction(
    delta: Factors,
    mean: Factors,
    *,
    lam: float = 0.01,
    lr: float = 0.01,
    tol: float = 1e-6,
    max_steps: int = 1000,
) -> Tensor:
    """LoRA-FAIR's correction of one site (2411.14961): ``dB`` [out, r] for the mean B, in its
    dtype.

    Minimises ``1 - cos(delta, (B + dB) A) + lam ||dB||`` by gradient steps from ``dB = 0``.

    Args:
        delta: the exact mean of the products, factored (``concat(adapters, p)`` of this site); its
            norm is irrelevant.
        mean: the mean factors ``(A, B)`` of the site; the scale (> 0) is irrelevant.
        lam, lr, tol, max_steps: weight of the norm; step size; stop at a gain below ``tol`` or
        after ``max_steps``.

    A step that would raise the objective is not taken: the step size is halved instead, so the
    result is never worse than no correction. Zero where the cosine is undefined (delta = 0 or B A =
    0). Only [out, r] and [r, r] matrices are formed. AdapterError for clashing shapes or settings.
    """
    if delta.A.shape[1] != mean.A.shape[1] or delta.B.shape[0] != mean.B.shape[0]:
        raise AdapterError(
            f"The update is [{delta.B.shape[0]}, {delta.A.shape[1]}] but the mean factors are "
            f"[{mean.B.shape[0]}, {mean.A.shape[1]}]: compare the same site."
        )
    if not (lam >= 0 and lr > 0 and tol >= 0 and max_steps >= 0):
        raise AdapterError(
            f"lam {lam}, tol {tol} and max_steps {max_steps} must be >= 0, lr {lr} > 0."
        )
    a, b = mean.A.double(), mean.B.double()
    # Everything the objective needs of the products: <delta, X A> = <target, X> and ||X A||^2 = <X
    # K, X>.
    target = delta.scale * (delta.B.double() @ (delta.A.double() @ a.T))
    gram = a @ a.T
    length = abs(delta.scale) * torch.linalg.norm(
        torch.linalg.qr(delta.B.double(), mode="r").R @ delta.A.double()
    )

    def evaluate(change: Tensor) -> tuple[float, Tensor]:
        x = b + change
        image = x @ gram
        inner, size = (target * x).sum(), (image * x).sum().clamp_min(0).sqrt()
        cost = torch.linalg.norm(change)
        value = 1 - inner / (length * size) + lam * cost
        slope = -(target / (length * size) - inner / (length * size**3) * image)
        # ||.|| has no slope at 0: take the smallest subgradient, 0.
        return float(value), slope + (lam / cost * change if cost > 0 else 0.0)

    change = torch.zeros_like(b)
    if not (length > 0 and (b @ gram * b).sum() > 0):
        return change.to(mean.B.dtype)
    value, slope = evaluate(change)
    for _ in range(max_steps):
        trial = change - lr * slope
        lower, next_slope = evaluate(trial)
        gain = value - lower
        if gain >= 0:
            change, value, slope = trial, lower, next_slope
        else:
            lr /= 2
        if abs(gain) < tol:
            break
    return change.to(mean.B.dtype)
