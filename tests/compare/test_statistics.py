"""The tests against scipy, and Holm's adjustment against an example by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fedgrove.compare.collect import tests as against_best
from fedgrove.compare.statistics import holm, paired


@pytest.mark.parametrize("n", [4, 30, 120])
def test_paired_is_what_scipy_says(n: int) -> None:
    rng = np.random.default_rng(n)
    ours, other = rng.normal(0.1, 1, n), rng.normal(0, 1, n)
    found = paired(list(ours), list(other))
    assert found.n == n
    assert found.difference == pytest.approx(np.mean(ours - other), abs=1e-12)
    assert found.p == pytest.approx(stats.wilcoxon(ours, other).pvalue, rel=1e-9)
    interval = stats.bootstrap(
        (ours - other,),
        np.mean,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = interval.high - interval.low
    assert found.low == pytest.approx(interval.low, abs=0.05 * width)
    assert found.high == pytest.approx(interval.high, abs=0.05 * width)
    assert found == paired(list(ours), list(other))


def test_a_difference_that_is_rounding_is_none() -> None:
    """0.75 − 0.7 and 0.3 − 0.25 differ in their last bits, but their ranks must tie; scipy alone
    would order them.
    """
    ours, other = [0.75, 0.3, 0.5, 0.4], [0.7, 0.25, 0.55, 0.4]
    assert paired(ours, other).p == pytest.approx(stats.wilcoxon([1, 1, -1, 0]).pvalue)


def test_no_difference_at_all() -> None:
    found = paired([0.5, 0.6], [0.5, 0.6])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="one length"):
        paired([1.0], [1.0, 2.0])


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_holm_is_the_closure_of_bonferroni() -> None:
    """A hypothesis is rejected where every group of hypotheses with it is, by Bonferroni."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        p = dict(zip("abcde", rng.uniform(0, 0.4, 5), strict=True))
        found = holm(p)
        groups = [g for size in range(1, 6) for g in itertools.combinations(p, size)]
        for name in p:
            largest = max(len(g) * min(p[n] for n in g) for g in groups if name in g)
            assert found[name] == pytest.approx(min(1.0, largest))


def test_one_pair_and_many_pairs_have_an_interval() -> None:
    one = paired([0.7], [0.5])
    assert one.n == 1
    assert [one.low, one.high] == pytest.approx([0.2, 0.2])
    rng = np.random.default_rng(0)
    ours = rng.normal(0.01, 0.1, 30_000)
    many = paired(list(ours), [0.0] * len(ours))
    half = 1.96 * 0.1 / math.sqrt(len(ours))
    assert many.low == pytest.approx(many.difference - half, abs=0.15 * half)
    assert many.high == pytest.approx(many.difference + half, abs=0.15 * half)


def test_everyone_is_tested_against_the_best_over_seeds_and_clients() -> None:
    rng = np.random.default_rng(0)

    def row(label: str, level: float) -> dict[str, object]:
        values = {
            seed: {f"c{i}": float(rng.normal(level, 0.1)) for i in range(6)} for seed in ("0", "1")
        }
        pooled = [value for each in values.values() for value in each.values()]
        return {
            "label": label,
            "metric": {"mean": float(np.mean(pooled))},
            "values": {"metric": values},
            "all": pooled,
        }

    rows = [row("low", 0.2), row("high", 0.9), row("middle", 0.5)]
    found = against_best(rows, "metric")
    assert found["best"] == "high"
    assert list(found["against_best"]) == ["low", "middle"]
    for index, label in ((0, "low"), (2, "middle")):
        test = found["against_best"][label]
        assert test["n"] == 12
        assert test["difference"] < 0
        assert test["p"] == pytest.approx(stats.wilcoxon(rows[index]["all"], rows[1]["all"]).pvalue)
        assert test["low"] <= test["difference"] <= test["high"]
    raw = {label: test["p"] for label, test in found["against_best"].items()}
    assert {label: test["p_holm"] for label, test in found["against_best"].items()} == holm(raw)
