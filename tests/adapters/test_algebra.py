"""Every rule against its dense float64 formula, on random, mixed-rank, badly scaled adapters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgrove.adapters import algebra
from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.private import seal
from fedgrove.ground.errors import AdapterError

SITES = {"layer.0.query": (7, 5), "layer.1.value": (4, 9)}  # out, in


def draw(
    seed: int,
    rank: int,
    scale: float = 2.0,
    *,
    size: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        site: Factors(
            torch.randn(rank, k, generator=generator, dtype=torch.float64).to(dtype),
            (size * torch.randn(d, rank, generator=generator, dtype=torch.float64)).to(dtype),
            scale,
        )
        for site, (d, k) in SITES.items()
    }


def dense(adapter: Adapter, site: str) -> Tensor:
    f = adapter[site]
    return f.scale * (f.B.double() @ f.A.double())


def test_mean_of_factors() -> None:
    adapters, n = [draw(seed, 3) for seed in range(4)], [10.0, 30.0, 5.0, 55.0]
    result = algebra.mean(adapters, n)
    for site in SITES:
        for side in ("A", "B"):
            want = sum(
                w / 100 * getattr(each[site], side) for w, each in zip(n, adapters, strict=True)
            )
            torch.testing.assert_close(getattr(result[site], side), want, rtol=1e-14, atol=1e-14)
        assert result[site].scale == 2.0


def test_mean_keeps_the_dtype_and_weighs_uniformly_by_default() -> None:
    adapters = [draw(seed, 3, dtype=torch.bfloat16) for seed in range(3)]
    result = algebra.mean(adapters)
    for site in SITES:
        want = torch.stack([each[site].A.double() for each in adapters]).mean(0).bfloat16()
        assert result[site].A.dtype == result[site].B.dtype == torch.bfloat16
        assert torch.equal(result[site].A, want)


def test_mean_refuses_mixed_ranks_and_scales() -> None:
    with pytest.raises(AdapterError, match=r"layer\.0\.query.*ranks \[2, 3\]"):
        algebra.mean([draw(0, 2), draw(1, 3)])
    with pytest.raises(AdapterError, match=r"layer\.0\.query.*scales \[1\.0, 2\.0\].*rescale"):
        algebra.mean([draw(0, 2), draw(1, 2, scale=1.0)])


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [1.0, 1.0, 1.0]],
)
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(AdapterError, match=r"[Ww]eights"):
        algebra.mean([draw(0, 2), draw(1, 2)], weights)


def test_check_accepts_mixed_ranks_and_scales() -> None:
    algebra.check([draw(0, 2), draw(1, 5, scale=0.1), draw(2, 1, dtype=torch.float32)])


def broken(change: str) -> Adapter:
    adapter = draw(9, 2)
    f = adapter["layer.1.value"]
    if change == "missing":
        del adapter["layer.1.value"]
    elif change == "extra":
        adapter["layer.2.value"] = f
    elif change == "nan":
        f.B[1, 1] = float("nan")
    elif change == "inf":
        f.A[0, 0] = float("inf")
    elif change == "pair":
        adapter["layer.1.value"] = Factors(f.A, f.B[:, :1], 1.0)
    elif change == "axes":
        adapter["layer.1.value"] = Factors(f.A[0], f.B, 1.0)
    elif change == "in":
        adapter["layer.1.value"] = Factors(f.A[:, :4], f.B, 1.0)
    elif change == "out":
        adapter["layer.1.value"] = Factors(f.A, f.B[:3], 1.0)
    elif change == "scale":
        adapter["layer.1.value"] = Factors(f.A, f.B, math.inf)
    return adapter


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", "lacks site 'layer.1.value'"),
        ("extra", "extra site 'layer.2.value'"),
        ("nan", "NaN or Inf"),
        ("inf", "NaN or Inf"),
        ("pair", "no pair"),
        ("axes", "no pair"),
        ("in", "in 4"),
        ("out", "out 3"),
        ("scale", "scale is inf"),
    ],
)
def test_check_names_client_and_site(change: str, said: str) -> None:
    with pytest.raises(AdapterError) as caught:
        algebra.check([draw(0, 2), broken(change)], ["clinic-a", "clinic-b"])
    message = str(caught.value)
    assert said in message
    assert message.startswith("clinic-b")
    assert "layer." in message
    assert "\n" not in message


def test_check_refuses_nothing_at_all() -> None:
    with pytest.raises(AdapterError, match="at least one"):
        algebra.check([])


def test_concat_is_the_exact_sum() -> None:
    adapters = [draw(0, 1, 3.0), draw(1, 4, 0.25, size=1e6), draw(2, 2, -1.0, size=1e-6)]
    by_site = {"layer.0.query": 0.5, "layer.1.value": -2.0}
    result = algebra.concat(adapters, [1.0, by_site, 3.0])
    for site in SITES:
        want = (
            dense(adapters[0], site)
            + by_site[site] * dense(adapters[1], site)
            + 3.0 * dense(adapters[2], site)
        )
        torch.testing.assert_close(dense(result, site), want, rtol=1e-12, atol=1e-7)
        assert result[site].rank == 7
        assert result[site].scale == 1.0
        assert torch.equal(result[site].A, torch.cat([each[site].A for each in adapters]))


def test_concat_with_other_sites_counts_them_as_zero() -> None:
    part = {"layer.1.value": draw(1, 2)["layer.1.value"]}
    result = algebra.concat([draw(0, 3), part])
    assert [result[site].rank for site in SITES] == [3, 5]
    torch.testing.assert_close(dense(result, "layer.0.query"), dense(draw(0, 3), "layer.0.query"))


def test_concat_refuses() -> None:
    with pytest.raises(AdapterError, match="2 coefficients for 1"):
        algebra.concat([draw(0, 2)], [1.0, 2.0])
    with pytest.raises(AdapterError, match=r"no coefficient for site 'layer\.1\.value'"):
        algebra.concat([draw(0, 2)], [{"layer.0.query": 1.0}])
    with pytest.raises(AdapterError, match=r"layer\.1\.value"):
        algebra.concat([draw(0, 2), broken("in")])
    with pytest.raises(AdapterError, match="at least one"):
        algebra.concat([])


def test_private_terms_stay_private_in_a_concatenation() -> None:
    private = {site: factors.map(seal) for site, factors in draw(1, 2).items()}
    from fedgrove.adapters.private import is_private

    result = algebra.concat([draw(0, 2), private])
    assert all(is_private(factors.A) and is_private(factors.B) for factors in result.values())


def test_rescale_folds_into_b() -> None:
    adapter = draw(0, 3, scale=2.0)
    result = algebra.rescale(adapter, 0.7)
    for site in SITES:
        assert result[site].scale == 0.7
        assert torch.equal(result[site].A, adapter[site].A)
        torch.testing.assert_close(
            dense(result, site), dense(adapter, site), rtol=1e-14, atol=1e-14
        )
    assert torch.equal(algebra.rescale(adapter, 2.0)["layer.0.query"].B, adapter["layer.0.query"].B)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(AdapterError, match="Scale"):
            algebra.rescale(adapter, bad)


def test_truncate_and_pad() -> None:
    adapter = draw(0, 4)
    short = algebra.truncate(adapter, 3)
    long = algebra.pad(short, 6)
    for site in SITES:
        f = adapter[site]
        torch.testing.assert_close(
            dense(short, site), 2.0 * sum(torch.outer(f.B[:, j], f.A[j]) for j in range(3))
        )
        assert long[site].rank == 6
        assert not long[site].A[3:].any()
        assert not long[site].B[:, 3:].any()
        assert torch.equal(dense(long, site), dense(short, site))
        assert algebra.truncate(adapter, 9)[site].rank == 4
    with pytest.raises(AdapterError, match=r"layer\.0\.query.*rank 4"):
        algebra.pad(adapter, 3)
    for bad in (algebra.pad, algebra.truncate):
        with pytest.raises(AdapterError, match="at least 1"):
            bad(adapter, 0)


def test_select_and_split() -> None:
    adapter = draw(0, 5)
    chosen, rest = algebra.split(adapter, [1, 4])
    for site in SITES:
        f = adapter[site]
        want = 2.0 * (torch.outer(f.B[:, 1], f.A[1]) + torch.outer(f.B[:, 4], f.A[4]))
        torch.testing.assert_close(dense(chosen, site), want)
        torch.testing.assert_close(dense(rest, site), dense(adapter, site) - want)
        assert torch.equal(algebra.select(adapter, [1, 4])[site].A, f.A[[1, 4]])
    everything, nothing = algebra.split(adapter, range(5))
    assert all(nothing[site].rank == 0 and not dense(nothing, site).any() for site in SITES)
    assert all(torch.equal(everything[site].B, adapter[site].B) for site in SITES)
    by_site = algebra.select(adapter, {"layer.0.query": [0], "layer.1.value": [2, 3]})
    assert [by_site[site].rank for site in SITES] == [1, 2]


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [-1, 2], [3, 5]])
def test_select_refuses_indices_that_would_mislabel_rows(indices: list[int]) -> None:
    with pytest.raises(AdapterError, match=r"layer\.0\.query.*ascending"):
        algebra.select(draw(0, 5), indices)


def test_select_refuses_a_site_without_indices() -> None:
    with pytest.raises(AdapterError, match=r"layer\.1\.value"):
        algebra.select(draw(0, 5), {"layer.0.query": [0]})


def test_index_mean_by_hand() -> None:
    previous, modules = draw(9, 4), [draw(0, 2), draw(1, 3)]
    indices = [[0, 2], [0, 1, 2]]
    result = algebra.index_mean(modules, indices, previous, [1.0, 3.0])
    for site in SITES:
        a0, a1, old = modules[0][site].A, modules[1][site].A, previous[site].A
        want = torch.stack([a0[0] / 4 + 3 * a1[0] / 4, a1[1], a0[1] / 4 + 3 * a1[2] / 4, old[3]])
        torch.testing.assert_close(result[site].A, want)
        b0, b1, old = modules[0][site].B, modules[1][site].B, previous[site].B
        want = torch.stack(
            [b0[:, 0] / 4 + 3 * b1[:, 0] / 4, b1[:, 1], b0[:, 1] / 4 + 3 * b1[:, 2] / 4, old[:, 3]],
            1,
        )
        torch.testing.assert_close(result[site].B, want)
        assert torch.equal(result[site].A[3], previous[site].A[3])


@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [120.0, 33.0, 71.0]])
def test_index_mean_with_all_indices_is_the_mean_bit_for_bit(weights: list[float] | None) -> None:
    modules = [draw(seed, 4, dtype=torch.float32) for seed in range(3)]
    whole = algebra.mean(modules, weights)
    for indices in (None, [list(range(4))] * 3):
        result = algebra.index_mean(modules, indices, draw(9, 4, dtype=torch.float32), weights)
        assert all(
            torch.equal(result[s].A, whole[s].A) and torch.equal(result[s].B, whole[s].B)
            for s in SITES
        )


def test_index_mean_refuses() -> None:
    with pytest.raises(AdapterError, match=r"0\.\.2"):
        algebra.index_mean([draw(0, 1)], [[3]], draw(1, 3))
    with pytest.raises(AdapterError, match="1 modules but 2"):
        algebra.index_mean([draw(0, 1)], [[0, 1]], draw(1, 3))
    with pytest.raises(AdapterError, match="scales"):
        algebra.index_mean([draw(0, 1, scale=1.0)], [[0]], draw(1, 3))
    with pytest.raises(AdapterError, match="1 lists"):
        algebra.index_mean([draw(0, 1), draw(2, 1)], [[0]], draw(1, 3))


def test_subtract_products() -> None:
    a, b = draw(0, 3, 0.5), draw(1, 5, 7.0)
    result = algebra.subtract_products(a, b)
    for site in SITES:
        torch.testing.assert_close(
            dense(result, site), dense(a, site) - dense(b, site), rtol=1e-13, atol=1e-13
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(5)), st.floats(0.1, 10))
def test_common_modules_cancel_exactly(seed: int, order: list[int], scale: float) -> None:
    """In float32, in any order, folded or not: the reason why Fed-PLoRA's initial noise is 0 and
    not 1e-7.
    """
    whole = draw(seed, 5, scale, dtype=torch.float32)
    chosen = sorted(order[:2])
    shuffled = algebra.concat(list(reversed(algebra.split(whole, chosen))))
    assert all(f.rank == 0 for f in algebra.subtract_products(whole, shuffled).values())
    left = algebra.subtract_products(whole, algebra.pad(algebra.select(whole, chosen), 5))
    assert all(f.rank == 3 for f in left.values())


def test_common_modules_cancel_as_often_as_both_hold_them() -> None:
    one = draw(0, 1)
    twice = algebra.concat([one, one])
    assert all(f.rank == 1 for f in algebra.subtract_products(twice, one).values())
    for site in SITES:
        torch.testing.assert_close(
            dense(algebra.subtract_products(one, twice), site), -dense(one, site)
        )


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_norms(rank: int) -> None:
    adapter = draw(0, rank, -1.5, size=1e-3)
    want = {site: float(torch.linalg.norm(dense(adapter, site))) for site in SITES}
    assert algebra.norm(adapter) == pytest.approx(want, rel=1e-12)
    assert algebra.product_norm(adapter) == pytest.approx(math.hypot(*want.values()), rel=1e-12)


def test_the_norm_of_an_almost_cancelling_sum_keeps_its_digits() -> None:
    a = draw(0, 3)
    b = {site: Factors(f.A, f.B * (1 + 1e-10), f.scale) for site, f in a.items()}
    got = algebra.norm(algebra.subtract_products(a, b))
    for site in SITES:
        assert got[site] == pytest.approx(
            float(torch.linalg.norm(dense(a, site) - dense(b, site))), rel=1e-4
        )


def test_norm_of_an_empty_adapter_is_zero() -> None:
    assert algebra.product_norm(algebra.split(draw(0, 2), [0, 1])[1]) == 0.0
