"""What a mean of factors loses against the mean of products, and two ways to give it back:
FedEx-LoRA and LoRA-FAIR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import Weights, concat, mean, shares, widen
from fedgrove.adapters.lowrank import compact
from fedgrove.ground.errors import AdapterError


def fedex_residual(
    adapters: Sequence[Adapter],
    weights: Weights = None,
) -> Adapter:
    """FedEx-LoRA's residual ``sum_i p_i s B_i A_i - s mean(B) mean(A)`` (2410.09432), factored and
    compacted.

    Scale 1, dtype of the input, rank at most ``min(out, in, (N - 1) r)``: added to ``mean(adapters,
    weights)`` it is the exact mean of the products. AdapterError for unequal ranks or scales.
    """
    # The mean before it is rounded to the input's dtype lies in the span of the clients' columns:
    # no rank for rounding.
    first = adapters[0]
    wide = [widen(each) for each in adapters]
    middle = mean(wide, weights)
    parts = shares(weights, len(adapters))
    stack = concat([*wide, middle], [*parts, -1.0])
    # What is left of it is small beside what cancels, so its rank is known and not found from its
    # singular values.
    any_factors = next(iter(first.values()))
    most = (len(adapters) - 1) * any_factors.rank
    exact = compact(stack, max(1, most))
    result: Adapter = {}
    for site, factors in exact.items():
        like = first[site]
        A = factors.A.to(like.A.dtype)
        B = factors.B.to(like.B.dtype)
        result[site] = Factors(A, B, factors.scale)
    return result


def fair_correction(
    delta: Factors,
    mean: Factors,
    *,
    lam: float = 0.01,
    lr: float = 0.01,
    tol: float = 1e-6,
    max_steps: int = 1000,
) -> Float[Tensor, "out r"]:
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
    _same_site(delta, mean)
    if not (lam >= 0 and lr > 0 and tol >= 0 and max_steps >= 0):
        raise AdapterError(
            f"lam {lam}, tol {tol} and max_steps {max_steps} must be >= 0, lr {lr} > 0."
        )
    objective = _objective(delta, mean, lam)
    change = torch.zeros_like(objective.b)
    if objective.undefined():
        return change.to(mean.B.dtype)
    value, slope = objective.at(change)
    for _ in range(max_steps):
        trial = change - lr * slope
        lower, next_slope = objective.at(trial)
        gain = value - lower
        if gain >= 0:
            change = trial
            value = lower
            slope = next_slope
        else:
            lr /= 2
        if abs(gain) < tol:
            break
    return change.to(mean.B.dtype)


def _same_site(delta: Factors, mean: Factors) -> None:
    update = [delta.B.shape[0], delta.A.shape[1]]
    factors = [mean.B.shape[0], mean.A.shape[1]]
    if update != factors:
        raise AdapterError(
            f"The update is {update} but the mean factors are {factors}: compare the same site."
        )


@dataclass(frozen=True, eq=False)
class _Objective:
    """``1 - cos(delta, X A) + lam ||X - B||`` of one site, with what it needs of the products:
    ``<delta, X A> = <target, X>`` and ``||X A||^2 = <X K, X>``.
    """

    b: Float[Tensor, "out r"]  # the mean B
    target: Float[Tensor, "out r"]
    gram: Float[Tensor, "r r"]  # K
    length: Float[Tensor, ""]  # of delta
    lam: float

    def undefined(self) -> bool:
        """Whether delta or the mean's product is zero, so that they have no cosine."""
        square = (self.b @ self.gram * self.b).sum()
        return not (self.length > 0 and square > 0)

    def at(self, change: Float[Tensor, "out r"]) -> tuple[float, Float[Tensor, "out r"]]:
        """(value, slope) at ``X = B + change``."""
        x = self.b + change
        image = x @ self.gram
        inner = (self.target * x).sum()
        size = (image * x).sum().clamp_min(0).sqrt()
        both = self.length * size
        cost = torch.linalg.norm(change)
        value = 1 - inner / both + self.lam * cost
        along = inner / (self.length * size**3)
        slope = -(self.target / both - along * image)
        if cost > 0:
            slope = slope + self.lam / cost * change
        # ||.|| has no slope at 0: the smallest subgradient, 0, is taken.
        return float(value), slope


def _objective(
    delta: Factors,
    mean: Factors,
    lam: float,
) -> _Objective:
    a = mean.A.double()
    b = mean.B.double()
    of_delta = delta.map(Tensor.double)
    crossed = of_delta.A @ a.T
    target = delta.scale * (of_delta.B @ crossed)
    triangle = torch.linalg.qr(of_delta.B, mode="r").R
    length = torch.linalg.norm(triangle @ of_delta.A)
    return _Objective(
        b=b,
        target=target,
        gram=a @ a.T,
        length=abs(delta.scale) * length,
        lam=lam,
    )
