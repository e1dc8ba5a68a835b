"""Effects with their intervals: paired over clients within seeds, seeds as clusters.

The clients of one seed were trained together, so they are not independent: the standard error is
that of a regression on a constant with clusters (Liang & Zeger 1986), and the interval is Student's
with one degree of freedom less than there are seeds. With as many clients in every seed it is the
t-interval over the seeds' mean differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95

Scores = Mapping[int, Mapping[str, float]]  # seed -> client -> measure


@dataclass(frozen=True)
class Effect:
    """A difference; without an interval (``nan``) where fewer than two seeds were run."""

    mean: float
    low: float
    high: float
    seeds: int
    clients: int
    p: float

    @property
    def known(self) -> bool:
        return not math.isnan(self.low)


def paired(ours: Scores, other: Scores, *, higher: bool) -> Effect | None:
    """How much better ``ours`` is, over the clients and seeds that both have; None for none.

    ``higher``: whether larger measures are better; the effect's sign is that of an improvement.
    """
    sign = 1.0 if higher else -1.0
    rows = [
        (seed, sign * (ours[seed][client] - other[seed][client]))
        for seed in sorted(set(ours) & set(other))
        for client in sorted(set(ours[seed]) & set(other[seed]))
    ]
    return _clustered(rows)


def tails(ours: Scores, other: Scores, *, higher: bool) -> Effect | None:
    """The same of the tail: the client at the worst tenth of each seed."""
    sign = 1.0 if higher else -1.0
    rows = [
        (seed, sign * (tail(ours[seed], higher=higher) - tail(other[seed], higher=higher)))
        for seed in sorted(set(ours) & set(other))
    ]
    return _clustered(rows)


def tail(scores: Mapping[str, float], *, higher: bool) -> float:
    """The 10th-percentile client, of the worse end."""
    return float(np.percentile(list(scores.values()), 10 if higher else 90))


def mean(scores: Scores) -> float:
    """Over all clients of all seeds."""
    return float(np.mean([value for seed in scores.values() for value in seed.values()]))


def _clustered(rows: Sequence[tuple[int, float]]) -> Effect | None:
    if not rows:
        return None
    seeds = np.array([seed for seed, _ in rows])
    values = np.array([value for _, value in rows])
    count = len(set(seeds.tolist()))
    centre = float(values.mean())
    if count < 2:
        return Effect(centre, math.nan, math.nan, count, len(rows), math.nan)
    if np.ptp(values) == 0.0:
        return Effect(centre, centre, centre, count, len(rows), math.nan)
    import statsmodels.api as models

    fit = models.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": seeds}, use_t=True
    )
    low, high = fit.conf_int(alpha=1 - LEVEL)[0]
    return Effect(centre, float(low), float(high), count, len(rows), float(fit.pvalues[0]))


def recovery(groups: Sequence[Sequence[str]], truth: Mapping[str, int]) -> float:
    """The adjusted Rand index (Hubert & Arabie 1985) of found groups against the true ones."""
    from sklearn.metrics import adjusted_rand_score

    found = {name: number for number, group in enumerate(groups) for name in group}
    names = sorted(set(found) & set(truth))
    return float(
        adjusted_rand_score([truth[name] for name in names], [found[name] for name in names])
    )
