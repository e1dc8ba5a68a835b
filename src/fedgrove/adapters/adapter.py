"""The words *site*, *factors* and *adapter*. Pure data: no model, no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedgrove.ground.errors import AdapterError


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
    #: its tensors, by the letters by which terms say what trains and what stays
    letters: ClassVar[str] = "AB"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors [any shape] by letter."""
        return {letter: getattr(self, letter) for letter in self.letters}

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

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same factors with ``change`` applied to each tensor [any shape]."""
        return self.each(lambda letter, value: change(value))

    def each(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """The same factors with ``change(letter, tensor)`` in place of each tensor [any shape]."""
        return replace(
            self,
            A=change("A", self.A),
            B=change("B", self.B),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Dora(Factors):
    """One site's update of DoRA (Liu et al., arXiv 2402.09353): ``W0`` becomes ``M ⊙ (W0 + scale *
    B @ A) / ‖W0 + scale * B @ A‖``, row by row, with the magnitudes ``M [out]``.

    It is no summand beside ``W0``, so nothing that adds or cuts products may be given one.
    """

    M: Tensor
    letters: ClassVar[str] = "ABM"

    def each(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """As of Factors, with M [out] too."""
        return replace(
            self,
            A=change("A", self.A),
            B=change("B", self.B),
            M=change("M", self.M),
        )


def factors_of(tensors: Sequence[Tensor], scale: float) -> Factors:
    """The factors of two tensors, A [rank, in] and B [out, rank], or the update of DoRA of three, with
    M [out].
    """
    if len(tensors) == len(Dora.letters):
        A, B, M = tensors
        return Dora(A, B, scale, M)
    if len(tensors) == len(Factors.letters):
        A, B = tensors
        return Factors(A, B, scale)
    raise AdapterError(f"{len(tensors)} tensors are no update of a site; give A and B, or A, B, M.")


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
