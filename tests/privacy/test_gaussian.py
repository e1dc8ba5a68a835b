"""The discrete Gaussian: its distribution, its exact arithmetic, the grid, and that the accountant's
figures hold for it.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from fedgrove.privacy import accountant, gaussian
from fedgrove.privacy.gaussian import STEPS, Grid, discrete_gaussian
from fedgrove.privacy.randomness import Stream, of_seed, uniform
from fedgrove.privacy.vector import shortened

KEY = of_seed(1, "test")


def draws(count: int, deviation: int, *purpose: object, tie: float = gaussian.TIE) -> np.ndarray:
    return discrete_gaussian(Stream(KEY, *purpose), count, deviation, tie=tie)


def masses(deviation: float, reach: int) -> np.ndarray:
    """The probabilities of -reach ... reach."""
    places = np.arange(-reach, reach + 1)
    weights = np.exp(-(places**2) / (2 * deviation**2))
    return np.asarray(weights / weights.sum())


# ------------------------------------------------------------ distribution
@pytest.mark.parametrize("deviation", [1, 2, 3, 7, 20])
def test_every_whole_number_has_its_probability(deviation: int) -> None:
    count, reach = 200_000, 12 * deviation
    wanted = count * masses(deviation, reach)
    found = np.bincount(draws(count, deviation, "small") + reach, minlength=2 * reach + 1)
    often = wanted > 8
    rest = wanted[~often].sum()
    distance = ((found - wanted)[often] ** 2 / wanted[often]).sum()
    distance += (found[~often].sum() - rest) ** 2 / rest
    assert stats.chi2.sf(distance, often.sum()) > 1e-3


@pytest.mark.parametrize("deviation", [1000, 700_001, STEPS])
def test_on_a_fine_grid_it_is_the_normal_distribution(deviation: int) -> None:
    found = draws(200_000, deviation, "fine") / deviation
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert abs(found.std() - 1) < 4 / math.sqrt(2 * len(found))
    assert abs((found**4).mean() - 3) < 0.1
    assert abs((found[:-1] * found[1:]).mean()) < 0.01
    for edge in (2.0, 3.0, 4.0):
        share, wanted = (np.abs(found) > edge).mean(), 2 * stats.norm.sf(edge)
        assert abs(share - wanted) < 5 * math.sqrt(wanted / len(found))


def test_the_lowest_bits_are_as_likely_as_each_other() -> None:
    """What Mironov's attack reads: on a grid they tell nothing."""
    lowest = draws(160_000, STEPS, "bits") & 15
    counts = np.bincount(lowest, minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-3


# ------------------------------------------------------------ exactness
@pytest.mark.parametrize("deviation", [1, 5, STEPS])
def test_double_precision_decides_as_exact_arithmetic_does(deviation: int) -> None:
    """With a tie of 2 every coin is settled exactly, and every draw is the same."""
    fast = draws(400, deviation, "exact")
    assert len(set(fast.tolist())) > 3
    assert np.array_equal(fast, draws(400, deviation, "exact", tie=2.0))


def test_a_coin_that_64_bits_do_not_settle_takes_more() -> None:
    half, most = Fraction(1, 2), math.exp(-0.5)
    edge = gaussian._bounds(half, 64)[0]
    assert abs(edge / 2**64 - most) < 1e-15
    assert gaussian._below(edge - 1, half, Stream(KEY, "edge"))
    assert not gaussian._below(edge + 1, half, Stream(KEY, "edge"))
    within = [gaussian._below(edge, half, Stream(KEY, "edge", n)) for n in range(300)]
    rest = gaussian._bounds(half, 128)[0] - (edge << 64)  # the share of the last cell that is below
    assert abs(np.mean(within) - rest / 2**64) < 4 * 0.5 / math.sqrt(300)


def test_bounds_hold_the_exponential_at_any_length() -> None:
    for bits in (64, 128, 640):
        low, high = gaussian._bounds(Fraction(1), bits)
        assert 0 <= high - low <= 1
        # e^-1 by its series, in whole numbers
        unit = 1 << (bits + 64)
        term, total = unit, 0
        for n in range(1, 400):
            total += term
            term = -term // n
        assert low - 1 <= total >> 64 <= high + 1


def test_the_geometric_numbers_are_powers_of_e() -> None:
    words = Stream(KEY, "geometric").words(100_000)
    found = gaussian._geometric(words, Stream(KEY, "more"))
    for times in range(5):
        wanted = math.exp(-times)
        share = (found >= times).mean()
        assert abs(share - wanted) < 5 * math.sqrt(wanted / len(words))
    edges = gaussian._geometric(gaussian._THRESHOLDS, Stream(KEY, "more"))
    assert set(edges + np.arange(len(edges)) - 45) <= {0, -1, 1}
    assert gaussian._geometric(np.zeros(1, np.uint64), Stream(KEY, "zero"))[0] >= 44


def test_draws_belong_to_their_key_and_purpose() -> None:
    assert np.array_equal(draws(50, STEPS, "a"), draws(50, STEPS, "a"))
    assert not np.array_equal(draws(50, STEPS, "a"), draws(50, STEPS, "b"))
    other = discrete_gaussian(Stream(of_seed(2, "test"), "a"), 50, STEPS)
    assert not np.array_equal(draws(50, STEPS, "a"), other)
    assert len(draws(0, 5, "a")) == 0
    with pytest.raises(ValueError, match="between 1 and"):
        draws(1, 0, "a")


# ------------------------------------------------------------ the grid
def test_what_is_cut_never_grows_and_sums_are_exact() -> None:
    grid = Grid.fine(0.5, 0.25)
    vectors = torch.randn(64, 500, generator=torch.Generator().manual_seed(1)).double()
    short = [shortened(vector, 0.25) for vector in vectors]
    steps = [grid.cut(vector) for vector in short]
    for each in steps:
        squares = sum(int(step) ** 2 for step in each)
        assert squares * Fraction(grid.step) ** 2 <= Fraction(0.25) ** 2
    total = torch.stack(steps).sum(0)
    assert torch.equal(total, torch.stack(steps[::-1]).sum(0))
    error = (total.double() * grid.step - torch.stack(short).sum(0)).abs().max()
    assert float(error) < len(steps) * grid.step
    assert grid.step < 1e-7 * 0.5


def test_whatever_the_noise_a_grid_holds_millions_of_members() -> None:
    for noise in (1e-30, 1e-12, 1e-3, 1.0, 300.0):
        grid = Grid.fine(noise * 0.7, 0.7)
        assert grid.deviation * grid.step >= noise * 0.7
        assert 0.7 / grid.step * 2**22 < 2**63
        noisy = grid.noisy(torch.zeros(2000, dtype=torch.int64), KEY, "grid", noise)
        spread = float(noisy.std()) / (grid.deviation * grid.step)
        assert abs(spread - 1) < 0.08


def test_a_given_grid_is_kept_and_its_noise_is_no_less() -> None:
    grid = Grid.given(2.0**-25, 0.3)
    assert grid.step == 2.0**-25
    assert 0.3 <= grid.deviation * grid.step < 0.3 * (1 + 1e-6)
    noisy = grid.noisy(torch.full((1000,), 7), KEY, "given")
    assert torch.equal(noisy / grid.step, (noisy / grid.step).round())


# ------------------------------------------------------------ the accountant
def divergence(one: np.ndarray, other: np.ndarray, order: int) -> float:
    """Rényi's, of whole order, from the probabilities themselves."""
    return math.log(np.sum(one * (one / other) ** (order - 1))) / (order - 1)


@pytest.mark.parametrize("shift", [1, 3, 8])
@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_the_moments_are_at_most_those_that_are_counted(shift: int, rate: float) -> None:
    """Both directions between "nobody" and "a member by a coin", from the probabilities of the
    discrete Gaussian, against the moments of the continuous one (Mironov, Talwar and Zhang 2019).
    """
    deviation, reach = 4, 120
    whole = masses(deviation, reach + shift)
    nobody, member = whole[shift:-shift], whole[: -2 * shift]
    somebody = rate * member + (1 - rate) * nobody
    for order in (2, 3, 5, 9):
        terms = [
            math.comb(order, k)
            * rate**k
            * (1 - rate) ** (order - k)
            * math.exp((k * k - k) * shift**2 / (2 * deviation**2))
            for k in range(order + 1)
        ]
        counted = math.log(sum(terms)) / (order - 1)
        assert divergence(somebody, nobody, order) <= counted * (1 + 1e-6) + 1e-12
        assert divergence(nobody, somebody, order) <= counted * (1 + 1e-6) + 1e-12
    assert counted > 0


def test_with_sampling_only_whole_orders_are_asked() -> None:
    assert all(isinstance(order, int) for order in accountant._WHOLE)


# ------------------------------------------------------------ the stream
def test_a_stream_goes_on_where_it_was_and_uniform_numbers_are_below_one() -> None:
    whole, parts = Stream(KEY, "s").words(100), Stream(KEY, "s")
    assert np.array_equal(np.concatenate([parts.words(30), parts.words(70)]), whole)
    found = uniform(KEY, 100_000, "b")
    assert 0 <= float(found.min()) < 1e-4 < 1 - 1e-4 < float(found.max()) < 1
    assert stats.kstest(found.numpy(), "uniform").pvalue > 1e-3
