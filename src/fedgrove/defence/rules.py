"""Robust centres of a group's updates: who is weighed how much, or which centre each coordinate has.

Shapes: n members of a group, of which ``f = ⌊share · n⌋`` may be attackers. Distances are those of
what the updates do to the model (of the products ``s B A``, not of A and B), from inner products
alone: ``d_ij² = G_ii + G_jj − 2 G_ij``. A group in which no attacker is to be expected (f = 0), or
that is too small for the rule, has its plain mean.

Sources: median and trimmed mean, Yin et al. 2018 (1803.01498); Krum and Multi-Krum, Blanchard et
al. 2017; Bulyan, El Mhamdi et al. 2018 (1802.07927); geometric median, Pillutla et al. 2019
(1912.13445). ``outliers`` is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Square = Float[Tensor, "n n"]
Vector = Float[Tensor, " n"]
Weigh = Callable[[Square, Vector, int], Vector]  # squared distances, shares, f -> shares
Value = Callable[[Float[Tensor, "n ..."], Vector, int], Float[Tensor, "..."]]

STEPS = 100  # of Weiszfeld's iteration at most
CLOSE = 1e-10  # it ends where no share moves by more
FAR = 2.0  # times the middle member's distance to the others: beyond it one is an outlier


@dataclass(frozen=True)
class Rule:
    """A robust centre: by weights, by coordinates, or first one and then the other."""

    about: str
    least: Callable[[int], int]  # the smallest group for f attackers
    weigh: Weigh | None = None
    value: Value | None = None


def squared_distances(gram: Square) -> Square:
    """``G_ii + G_jj − 2 G_ij``, never below 0."""
    own = gram.diagonal()
    sums = own[:, None] + own[None, :]
    apart = sums - 2 * gram
    return apart.clamp_min(0.0)


# ------------------------------------------------------------------------ by weights
def krum_scores(distances: Square, f: int) -> Vector:
    """Of each member the sum of squared distances to its ``n − f − 2`` nearest others."""
    count = len(distances)
    itself = torch.full((count,), torch.inf, dtype=distances.dtype)
    others = distances + torch.diag(itself)
    ordered = others.sort(1).values
    near = max(1, count - f - 2)
    return ordered[:, :near].sum(1)


def krum(
    distances: Square,
    shares: Vector,
    f: int,
) -> Vector:
    """All of the share to the member with the best score; of equal ones the first."""
    scores = krum_scores(distances, f)
    best = int(scores.argmin())
    chosen = torch.zeros_like(shares)
    chosen[best] = 1.0
    return chosen


def multi_krum(
    distances: Square,
    shares: Vector,
    f: int,
) -> Vector:
    """The ``n − f`` members with the best scores, by their shares."""
    scores = krum_scores(distances, f)
    order = scores.argsort(stable=True)
    best = order[: len(shares) - f]
    return _only(best, shares)


def bulyan_choice(
    distances: Square,
    shares: Vector,
    f: int,
) -> Vector:
    """Bulyan's first half: Krum's choice, again and again without the chosen, ``n − 2f`` times."""
    left = list(range(len(shares)))
    chosen: list[int] = []
    while len(chosen) < len(shares) - 2 * f:
        rows = torch.tensor(left)
        among = distances[rows][:, rows]
        best = int(krum_scores(among, f).argmin())
        chosen.append(left.pop(best))
    kept = torch.tensor(chosen)
    return _only(kept, shares)


def geometric_median(
    distances: Square,
    shares: Vector,
    f: int,
) -> Vector:
    """The shares whose weighted mean has the least sum of distances (Weiszfeld's iteration).

    The squared distance of a member to the mean with shares w is
    ``(D w)_i − ½ wᵀ D w``, so that no vector is needed.
    """
    w = shares.clone()
    for _ in range(STEPS):
        spread = 0.5 * (w @ distances @ w)
        squares = distances @ w - spread
        apart = squares.clamp_min(0.0).sqrt()
        least = 1e-6 * float(apart.max()) + torch.finfo(w.dtype).tiny
        moved = shares / apart.clamp_min(least)  # smoothed: a member may be the median itself
        moved = moved / moved.sum()
        change = float((moved - w).abs().max())
        w = moved
        if change < CLOSE:
            break
    return w


def without_outliers(
    distances: Square,
    shares: Vector,
    f: int,
) -> Vector:
    """Without those whose median distance to the others is twice that of the middle member, or
    more; at most ``f`` of them.
    """
    count = len(shares)
    apart = distances.sqrt()
    off = ~torch.eye(count, dtype=torch.bool)
    others = apart[off].reshape(count, count - 1)
    typical = others.median(1).values
    far = typical > FAR * typical.median()
    order = typical.argsort(descending=True, stable=True)
    worst = order[:f]
    out = torch.zeros(count, dtype=torch.bool)
    out[worst] = far[worst]
    kept = (~out).nonzero().flatten()
    return _only(kept, shares)


def _only(kept: Tensor, shares: Vector) -> Vector:
    """The shares of the kept ``[k]`` alone, adding up to 1."""
    result = torch.zeros_like(shares)
    result[kept] = shares[kept]
    total = result.sum()
    if total > 0:
        return result / total
    result[kept] = 1.0 / len(kept)
    return result


# -------------------------------------------------------------------- by coordinates
def median(
    stack: Float[Tensor, "n ..."],
    shares: Vector,
    f: int,
) -> Float[Tensor, ...]:
    """Each coordinate's median; of an even number the middle of the two. Shares have no say."""
    rows = stack.flatten(1)
    middle = torch.quantile(rows, 0.5, dim=0)
    return middle.reshape(stack.shape[1:])


def trimmed_mean(
    stack: Float[Tensor, "n ..."],
    shares: Vector,
    f: int,
) -> Float[Tensor, ...]:
    """Each coordinate's mean without its f largest and f smallest numbers, by the shares of the
    others.
    """
    rows = stack.flatten(1)
    order = rows.argsort(dim=0, stable=True)
    order = order[f : len(rows) - f]
    kept = rows.gather(0, order)
    weights = shares[order]
    total = weights.sum(0)
    even = torch.full_like(weights, 1.0 / len(order))
    parts = weights / total.clamp_min(1e-300)
    weights = torch.where(total > 0, parts, even)
    mean = (kept * weights).sum(0)
    return mean.reshape(stack.shape[1:])


def bulyan_mean(
    stack: Float[Tensor, "n ..."],
    shares: Vector,
    f: int,
) -> Float[Tensor, ...]:
    """Bulyan's second half: of the chosen (share above 0) the mean of the ``θ − 2f`` numbers nearest
    to the median, coordinate by coordinate.
    """
    chosen = shares > 0
    rows = stack[chosen].flatten(1)
    count = max(1, len(rows) - 2 * f)
    middle = torch.quantile(rows, 0.5, dim=0)
    off = (rows - middle).abs()
    near = off.argsort(dim=0, stable=True)[:count]
    mean = rows.gather(0, near).mean(0)
    return mean.reshape(stack.shape[1:])


RULES = {
    "median": Rule("each number's median", lambda f: 2 * f + 1, value=median),
    "trimmed-mean": Rule(
        "each number's mean without its largest and smallest",
        lambda f: 2 * f + 1,
        value=trimmed_mean,
    ),
    "krum": Rule("the one update nearest to its neighbours", lambda f: 2 * f + 3, weigh=krum),
    "multi-krum": Rule(
        "the mean of the updates nearest to their neighbours",
        lambda f: 2 * f + 3,
        weigh=multi_krum,
    ),
    "bulyan": Rule(
        "Krum's choice, then each number's mean near its median",
        lambda f: 4 * f + 3,
        weigh=bulyan_choice,
        value=bulyan_mean,
    ),
    "geometric-median": Rule(
        "the point with the least sum of distances",
        lambda f: 2 * f + 1,
        weigh=geometric_median,
    ),
    "outliers": Rule(
        "the mean without updates far from all others",
        lambda f: 2 * f + 1,
        weigh=without_outliers,
    ),
}


def expected(share: float, count: int) -> int:
    """f: how many attackers a group of ``count`` may have."""
    return int(share * count + 1e-9)


def usable(
    rule: Rule,
    share: float,
    count: int,
) -> int:
    """f, or a smaller number for which the group is large enough; 0: its plain mean."""
    f = expected(share, count)
    while f > 0 and count < rule.least(f):
        f -= 1
    return f


def ratios(found: Vector, shares: Sequence[float]) -> list[float]:
    """How much of each member's own share the rule left it, at most 1."""
    kept = []
    for new, old in zip(found.tolist(), shares, strict=True):
        ratio = 1.0
        if old > 0:
            ratio = min(1.0, new / old)
        kept.append(ratio)
    return kept
