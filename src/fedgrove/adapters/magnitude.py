"""The forward of DoRA (Liu et al., arXiv 2402.09353): a site's output scaled row by row.

``W0`` becomes ``g ⊙ (W0 + s B A)`` with the gains ``g = M / ‖W0 + s B A‖``, row by row. As in the
paper (section 4.3) and in PEFT no gradient goes through the norm. It is worked out of the small
products, without the dense ``B A``: ``‖w + s b A‖² = ‖w‖² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ`` for a row
``w`` of W0 and the row ``b`` of B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters.adapter import Dora


@dataclass(frozen=True, eq=False)
class Frozen:
    """The base's own layer at a site, in the adapters' precision."""

    weight: Float[Tensor, "out in"]
    norms: Float[Tensor, " out"]  # of its rows
    bias: Float[Tensor, " out"] | None


def row_norms(weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """The Euclidean norms of the rows."""
    return torch.linalg.vector_norm(weight, dim=1)


def gains(dora: Dora, layer: Frozen) -> Float[Tensor, " out"]:
    """What multiplies each row of ``W0 + s B A``; exactly 1 where nothing is trained. A row that is
    zero stays zero.
    """
    with torch.no_grad():
        A, B, scale = dora.A, dora.B, dora.scale
        across = F.linear(layer.weight, A)  # [out, rank]
        own = B @ (A @ A.T)
        square = layer.norms.square()
        square = square + 2 * scale * (B * across).sum(1)
        square = square + scale**2 * (B * own).sum(1)
        tiny = torch.finfo(square.dtype).tiny
        length = square.clamp_min(tiny).sqrt()
    return dora.M / length


def magnified(
    dora: Dora,
    gain: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    x: Float[Tensor, " *rows in"],
    output: Float[Tensor, " *rows out"],
) -> Float[Tensor, " *rows out"]:
    """The site's ``output`` of W0 and its bias as DoRA has it; the bias is not scaled."""
    own = output
    if bias is not None:
        own = output - bias
    update = F.linear(F.linear(x, dora.A) * dora.scale, dora.B)
    return output + (gain - 1) * own + gain * update
