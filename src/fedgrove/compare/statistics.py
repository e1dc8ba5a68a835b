"""Paired tests between methods, over the clients of all seeds.

Each pair is one client of one seed under two methods. The clients of one seed were trained
together, so pairs are not fully independent: the p-values are a guide, not a proof, and ``n`` is
always printed beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedgrove.ground.statistics import interval


@dataclass(frozen=True)
class Paired:
    """How one method differs from another: mean difference, its 95 % interval, and the p-value of
    Wilcoxon's test.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float


def paired(
    ours: Sequence[float],
    other: Sequence[float],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Paired:
    """``ours − other``, pair by pair, ``[n]`` each.

    The p-value is that of the two-sided Wilcoxon signed-rank test (pairs without a difference are
    left out, and with no difference at all it is 1). The interval is that of the percentile
    bootstrap of the mean difference (Efron & Tibshirani 1993, chapter 13) with a fixed seed. Both
    are scipy's.
    """
    from scipy.stats import wilcoxon

    if len(ours) != len(other) or not len(ours):
        raise ValueError(f"pairs need two lists of one length, not {len(ours)} and {len(other)}")
    exact = np.asarray(ours, dtype=float) - np.asarray(other, dtype=float)
    # 0.75 - 0.7 and 0.3 - 0.25 are one difference, and must tie
    differences = np.round(exact, 12)
    low, high = interval(differences, level, seed)
    p = 1.0
    if np.any(differences):
        p = float(wilcoxon(differences).pvalue)
    return Paired(
        n=len(differences),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p=p,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment for that many tests (Holm 1979): reject where the result is below
    the level. (scipy has none, and statsmodels is 65 MB for these lines.)
    """
    adjusted: dict[str, float] = {}
    highest = 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        left = len(ordered) - rank
        bound = min(1.0, left * p_values[name])
        highest = max(highest, bound)
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
