"""Dense float64 references of methods.md A3, written out here, for several aggregation rules."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgrove.adapters import algebra, noise
from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.lowrank import product_mean
from fedgrove.ground.errors import AdapterError

SITES = {"query": (7, 5), "value": (6, 8)}
S = 4 / 3  # not a power of two: folding it into B rounds


def draw(seed: int, rank: int, dtype: torch.dtype = torch.float64, scale: float = S) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        site: Factors(
            torch.randn(rank, k, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(d, rank, generator=generator, dtype=torch.float64).to(dtype),
            scale,
        )
        for site, (d, k) in SITES.items()
    }


def dense(adapter: Adapter, site: str) -> Tensor:
    f = adapter[site]
    return f.scale * (f.B.double() @ f.A.double())


def assert_noise(got: noise.Noise, want: dict[str, float], tolerance: float = 1e-10) -> None:
    assert got.sites == pytest.approx(want, rel=tolerance, abs=tolerance)
    assert got.total == pytest.approx(
        math.sqrt(sum(value**2 for value in want.values())), rel=tolerance, abs=tolerance
    )


def test_initial_noise_of_truncation_is_the_dropped_ranks() -> None:
    whole = draw(0, 4)
    starts = [algebra.truncate(whole, rank) for rank in (1, 2, 4)]
    want = {}
    for site in SITES:
        f = whole[site]
        lost = [sum(S * torch.outer(f.B[:, j], f.A[j]) for j in range(rank, 4)) for rank in (1, 2)]
        want[site] = sum(float(torch.linalg.norm(each)) for each in lost) / 3
    assert_noise(noise.initial_noise(whole, starts), want)


def test_initial_noise_of_folding_is_exactly_zero() -> None:
    whole = draw(0, 4, torch.float32)
    starts = [
        algebra.concat(algebra.split(whole, chosen)) for chosen in ([0], [1, 3], [0, 1, 2, 3])
    ]
    assert noise.initial_noise(whole, starts) == noise.Noise({"query": 0.0, "value": 0.0}, 0.0)


def test_initial_noise_of_a_fresh_restart_is_the_norm_of_the_global_update() -> None:
    whole, fresh = draw(0, 4), algebra.pad(algebra.truncate(draw(1, 2), 2), 2)
    fresh = {site: Factors(f.A, torch.zeros_like(f.B), f.scale) for site, f in fresh.items()}
    assert_noise(noise.initial_noise(whole, [fresh, fresh]), algebra.norm(whole))


def test_initial_noise_counts_sites_that_a_start_lacks() -> None:
    whole = draw(0, 2)
    want = {"query": 0.0, "value": algebra.norm(whole)["value"] / 2}
    assert_noise(noise.initial_noise(whole, [whole, {"query": whole["query"]}]), want)
    with pytest.raises(AdapterError, match="at least one"):
        noise.initial_noise(whole, [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_aggregation_noise_of_a_factor_mean(dtype: torch.dtype) -> None:
    ends, n = [draw(seed, 3, dtype) for seed in range(4)], [1.0, 2.0, 3.0, 4.0]
    new = algebra.mean(ends, n)
    want = {
        site: float(
            torch.linalg.norm(
                dense(new, site)
                - sum(w / 10 * dense(e, site) for w, e in zip(n, ends, strict=True))
            )
        )
        for site in SITES
    }
    assert min(want.values()) > 0.1
    assert_noise(noise.aggregation_noise(new, ends, n), want)


def test_aggregation_noise_of_exact_rules() -> None:
    ends = [draw(seed, 1 + seed, scale=1.0 + seed) for seed in range(3)]
    assert (
        noise.aggregation_noise(algebra.concat(ends, [0.2, 0.3, 0.5]), ends, [2, 3, 5]).total
        < 1e-13
    )
    assert noise.aggregation_noise(product_mean(ends, None, None, 2.0), ends).total < 1e-13
    alone = draw(5, 3, torch.float32)
    assert noise.aggregation_noise(alone, [alone]).total == 0.0


RANK = 4
CHOSEN = st.lists(st.sets(st.integers(0, RANK - 1), min_size=1).map(sorted), min_size=1, max_size=5)


def per_index_reference(
    site: str, previous: Adapter, modules: Sequence[Adapter], indices: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, float]:
    """The new global product, the ideal, and the true bound, one outer product at a time."""
    d, k = SITES[site]
    new, ideal, bound = torch.zeros(d, k).double(), torch.zeros(d, k).double(), 0.0
    for j in range(RANK):
        pairs = [
            (m[site].B[:, own.index(j)], m[site].A[own.index(j)])
            for m, own in zip(modules, indices, strict=True)
            if j in own
        ]
        if not pairs:
            kept = S * torch.outer(previous[site].B[:, j], previous[site].A[j])
            new, ideal = new + kept, ideal + kept
            continue
        b, a = (torch.stack(column).mean(0) for column in zip(*pairs, strict=True))
        new = new + S * torch.outer(b, a)
        for bi, ai in pairs:
            ideal = ideal + S * torch.outer(bi, ai) / len(pairs)
            bound += S / len(pairs) * float((bi - b).norm() * (ai - a).norm())
    return new, ideal, bound


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), indices=CHOSEN)
def test_per_index_noise_and_its_bound(seed: int, indices: list[list[int]]) -> None:
    previous = draw(seed, RANK)
    modules = [draw(seed + 1 + n, len(own)) for n, own in enumerate(indices)]
    new = algebra.index_mean(modules, indices, previous)
    measured, bounds, wanted = {}, {}, {}
    for site in SITES:
        product, ideal, bounds[site] = per_index_reference(site, previous, modules, indices)
        torch.testing.assert_close(dense(new, site), product, rtol=1e-12, atol=1e-12)
        measured[site] = float(torch.linalg.norm(product - ideal))
        wanted[site] = ideal
    got = noise.index_aggregation_noise(new, previous, modules, indices)
    bound = noise.noise_bound(previous, modules, indices)
    assert_noise(got, measured)
    assert_noise(bound, bounds)
    assert all(got.sites[site] <= bound.sites[site] + 1e-10 for site in SITES)
    assert got.total <= bound.total + 1e-10
    # Against another global update (raFLoRA's, after its SVD) the same ideal holds.
    other = draw(seed + 99, 2)
    want = {site: float(torch.linalg.norm(dense(other, site) - wanted[site])) for site in SITES}
    assert_noise(noise.index_aggregation_noise(other, previous, modules, indices), want)


def test_with_full_ranks_it_is_fedits_noise_and_the_bound_holds_for_weights() -> None:
    ends, n = [draw(seed, RANK) for seed in range(5)], [1.0, 2.0, 3.0, 4.0, 30.0]
    new = algebra.mean(ends, n)
    whole = noise.aggregation_noise(new, ends, n)
    by_index = noise.index_aggregation_noise(new, draw(9, RANK), ends, None, n)
    assert_noise(by_index, whole.sites)
    bound = noise.noise_bound(draw(9, RANK), ends, None, n)
    assert whole.total <= bound.total
    for site in SITES:
        a, b = (
            (sum(w / 40 * getattr(e[site], side) for w, e in zip(n, ends, strict=True)))
            for side in "AB"
        )
        want = sum(
            S * w / 40 * float(((e[site].A - a).norm(dim=1) * (e[site].B - b).norm(dim=0)).sum())
            for w, e in zip(n, ends, strict=True)
        )
        assert bound.sites[site] == pytest.approx(want, rel=1e-12)


def test_the_counterexample_to_the_printed_bound() -> None:
    """R = d = k = 1, clients (3, 3) and (-3, -3): the printed sum of deviations is 6, the noise 9,
    the true bound 9.
    """
    ends = [{"site": Factors(torch.tensor([[x]]), torch.tensor([[x]]), 1.0)} for x in (3.0, -3.0)]
    start = {"site": Factors(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)}
    new = algebra.index_mean(ends, [[0], [0]], start)
    printed = (
        sum(abs(float(e["site"].A)) + abs(float(e["site"].B)) for e in ends) / 2
    )  # the means are 0
    got = noise.index_aggregation_noise(new, start, ends, [[0], [0]])
    assert printed == 6.0
    assert got.total == pytest.approx(9.0, abs=1e-12)
    assert got.total > printed
    assert noise.noise_bound(start, ends, [[0], [0]]).total == pytest.approx(9.0, abs=1e-12)


def test_index_cosines_by_hand() -> None:
    indices = [[0, 2], [0, 1], [2, 3], [2]]
    modules = [draw(n, len(own)) for n, own in enumerate(indices)]
    for module in modules[3].values():
        module.B.zero_()  # a module of zero has no direction: left out
    got = noise.index_cosines(modules, RANK, indices)
    for site in SITES:
        sums, counts = torch.zeros(RANK, RANK).double(), torch.zeros(RANK, RANK)
        for i in range(3):
            for j in range(3):
                for p, left in enumerate(indices[i]):
                    for q, right in enumerate(indices[j]):
                        if i != j:
                            x = torch.outer(
                                modules[i][site].B[:, p], modules[i][site].A[p]
                            ).flatten()
                            y = torch.outer(
                                modules[j][site].B[:, q], modules[j][site].A[q]
                            ).flatten()
                            sums[left, right] += torch.dot(x, y) / x.norm() / y.norm()
                            counts[left, right] += 1
        torch.testing.assert_close(got[site].matrix, sums / counts, equal_nan=True)
        diagonal = torch.eye(RANK, dtype=torch.bool)
        assert got[site].same == pytest.approx(float(sums[diagonal].sum() / counts[diagonal].sum()))
        assert got[site].other == pytest.approx(
            float(sums[~diagonal].sum() / counts[~diagonal].sum())
        )


def test_index_cosines_without_pairs_and_of_copies() -> None:
    alone = noise.index_cosines([draw(0, 2)], 2)["query"]
    assert alone.same is None
    assert alone.other is None
    assert bool(alone.matrix.isnan().all())
    copies = noise.index_cosines([draw(0, 2), draw(0, 2)], 2)["query"]
    assert copies.same == pytest.approx(1.0, abs=1e-12)


def test_indices_must_fit_the_clients() -> None:
    previous, modules = draw(9, RANK), [draw(0, 2), draw(1, 2)]
    for call in (noise.noise_bound, lambda *x: noise.index_aggregation_noise(previous, *x)):
        with pytest.raises(AdapterError, match="1 lists"):
            call(previous, modules, [[0, 1]])
    with pytest.raises(AdapterError, match="2 modules but 1"):
        noise.index_cosines(modules, RANK, [[0], [0, 1]])
