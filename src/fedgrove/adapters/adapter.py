"""The words *site*, *factors* and *adapter*. Pure data: no model, no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Site:
    """One adapted linear layer of the base model: ``y = W0 x`` with ``W0 [out_features,
    in_features]``.
    """

    name: str  # module path in the base model, e.g. "encoder.layer.3.attention.self.query"
    layer: int  # index of the transformer layer it belongs to, from 0
    in_features: int
    out_features: int
    transposed: bool = False  # whether the model holds W0 as [in_features, out_features] (Conv1D)


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One site's low-rank update ``scale * B @ A`` with ``A [rank, in]`` and ``B [out, rank]``."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def product(self) -> Tensor:
        """The dense update ``scale * B @ A``, shape [out, in]. For tests and merging; the algebra
        avoids it.
        """
        return self.scale * (self.B @ self.A)

    def zeros(self, rank: int, scale: float) -> Factors:
        """``rank`` modules for the same layer, all zero."""
        return Factors(
            self.A.new_zeros(rank, self.A.shape[1]),
            self.B.new_zeros(self.B.shape[0], rank),
            scale,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Factors:
        """The same factors with ``change`` applied to A [rank, in] and to B [out, rank]."""
        return replace(
            self,
            A=change(self.A),
            B=change(self.B),
        )


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """LoRA's ``alpha / r``, or rsLoRA's ``alpha / sqrt(r)`` (Kalajdzievski, arXiv 2312.03732)."""
    if rslora:
        return alpha / math.sqrt(rank)
    return alpha / rank


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The alpha whose ``scale_of`` this scale is; a whole number is not missed by a rounded root."""
    if not rslora:
        return scale * rank
    alpha = scale * math.sqrt(rank)
    if math.isclose(alpha, round(alpha), rel_tol=1e-15):
        return float(round(alpha))
    return alpha


#: ``{site name: factors}``
Adapter = dict[str, Factors]
#: ``{site name: site}``
Sites = Mapping[str, Site]


def fresh(
    sites: Sites,
    rank: int,
    scale: float,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """A new adapter whose update is zero: Kaiming-uniform A (as in PEFT, ``a = sqrt(5)``), zero B.

    Sites are drawn in name order, so the draw depends on the generator alone.
    """
    adapter: Adapter = {}
    for name in sorted(sites):
        site = sites[name]
        bound = site.in_features**-0.5
        draw = torch.rand(rank, site.in_features, generator=generator, dtype=torch.float64)
        adapter[name] = Factors(
            A=((2 * draw - 1) * bound).to(dtype),
            B=torch.zeros(site.out_features, rank, dtype=dtype),
            scale=scale,
        )
    return {name: adapter[name] for name in sites}
