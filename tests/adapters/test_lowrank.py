"""The QR trick against the dense SVD. Products and subspaces are compared: signs and degenerate
directions are free.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.lowrank import (
    Split,
    compact,
    leading,
    lean,
    product_mean,
    product_svd,
    truncated,
)
from fedgrove.ground.errors import AdapterError

D, K = 12, 9


def draw(
    seed: int, ranks: list[int], sizes: list[float], dtype: torch.dtype = torch.float64
) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(r, K, generator=generator, dtype=torch.float64).to(dtype),
            (size * torch.randn(D, r, generator=generator, dtype=torch.float64)).to(dtype),
            0.5 + n,
        )
        for n, (r, size) in enumerate(zip(ranks, sizes, strict=True))
    ]


def dense_sum(factors: list[Factors], weights: list[float]) -> np.ndarray:
    total = np.zeros((factors[0].B.shape[0], factors[0].A.shape[1]))
    for w, f in zip(weights, factors, strict=True):
        total += w * f.scale * f.B.double().numpy() @ f.A.double().numpy()
    return total


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix)
    return np.asarray((u[:, :rank] * s[:rank]) @ vh[:rank])


def sites(factors: list[Factors]) -> list[Adapter]:
    return [{"site": each} for each in factors]


def effective(f: Factors) -> np.ndarray:
    return np.asarray(f.scale * f.B.double().numpy() @ f.A.double().numpy())


def assert_orthonormal(columns: Tensor, tolerance: float = 1e-12) -> None:
    gram = columns.double().T @ columns.double()
    assert float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max()) < tolerance


#: 0, or a number whose square is none of the tiny ones that have lost their digits: the check
#: itself takes norms
WEIGHTS = st.floats(-2, 2).map(lambda weight: weight if abs(weight) > 1e-100 else 0.0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clients=st.lists(
        st.tuples(st.integers(1, 6), st.floats(-8, 8), WEIGHTS), min_size=1, max_size=5
    ),
    rank=st.integers(1, 9),
)
def test_product_svd_is_the_dense_svd(
    seed: int, clients: list[tuple[int, float, float]], rank: int
) -> None:
    ranks, powers, weights = (list(column) for column in zip(*clients, strict=True))
    factors = draw(seed, ranks, [10.0**power for power in powers])
    whole = dense_sum(factors, weights)
    u, s, vh = product_svd(factors, weights, rank)
    truth = np.linalg.svd(whole, compute_uv=False)
    assert s.shape == (rank,)
    assert u.shape == (D, rank)
    assert vh.shape == (rank, K)
    tolerance = 1e-10 * max(truth[0], 1e-300)
    np.testing.assert_allclose(s.numpy(), truth[:rank], rtol=0, atol=tolerance)
    assert_orthonormal(u)
    assert_orthonormal(vh.T)
    lost = np.linalg.norm(whole - (u * s).numpy() @ vh.numpy())
    assert lost <= np.linalg.norm(truth[rank:]) * (1 + 1e-9) + tolerance
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


def test_float32_input_gives_float64_accuracy_and_float32_output() -> None:
    """Badly scaled clients: 1e4 and 1e-4. float32 arithmetic would lose the small one
    altogether.
    """
    factors = draw(3, [2, 3], [1e4, 1e-4], torch.float32)
    u, s, vh = product_svd(factors, [1.0, 1.0])
    assert u.dtype == s.dtype == vh.dtype == torch.float32
    truth = np.linalg.svd(dense_sum(factors, [1.0, 1.0]), compute_uv=False)[:5]
    np.testing.assert_allclose(s.numpy(), truth, rtol=1e-6)


def test_a_weight_of_none_is_one_and_the_rank_defaults_to_all() -> None:
    factors = draw(1, [2, 3], [1.0, 1.0])
    u, s, vh = product_svd(factors)
    assert len(s) == 5
    np.testing.assert_allclose(
        (u * s).numpy() @ vh.numpy(), dense_sum(factors, [1.0, 1.0]), atol=1e-12
    )
    assert len(product_svd(draw(1, [6, 6], [1.0, 1.0]))[1]) == K


def test_zero_and_deficient_input_still_give_orthonormal_bases() -> None:
    zero = Factors(torch.randn(3, K), torch.zeros(D, 3), 1.0)
    u, s, vh = product_svd([zero], rank=5)
    assert not s.any()
    assert_orthonormal(u, 1e-6)
    assert_orthonormal(vh.T, 1e-6)
    same = draw(0, [2], [1.0])[0]
    u, s, vh = product_svd([same, same, same], rank=4)
    assert float(s[2]) < 1e-12 * float(s[0])
    assert_orthonormal(u)
    np.testing.assert_allclose((u * s).numpy() @ vh.numpy(), 3 * effective(same), atol=1e-12)


@pytest.mark.parametrize("split", ["left", "right", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_product_mean(split: Split, dtype: torch.dtype) -> None:
    factors = draw(5, [1, 4, 2], [1e3, 1.0, 1e-3], dtype)
    n = [10.0, 70.0, 20.0]
    whole = dense_sum(factors, [w / 100 for w in n])
    result = product_mean(sites(factors), n, 3, 1.6, split)["site"]
    assert result.scale == 1.6
    assert result.rank == 3
    assert result.A.dtype == result.B.dtype == dtype
    error = np.linalg.norm(effective(result) - best(whole, 3)) / np.linalg.norm(whole)
    assert error < (1e-12 if dtype == torch.float64 else 1e-6)
    a, b = result.A.double(), result.B.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    if split == "left":
        assert_orthonormal(b, tolerance)
    elif split == "right":
        assert_orthonormal(a.T, tolerance)
    else:
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-5, atol=1e-9)


def test_product_mean_without_a_rank_is_exact() -> None:
    factors = draw(6, [2, 3], [1.0, 1.0])
    result = product_mean(sites(factors), None, None, 2.0)["site"]
    assert result.rank == 5
    np.testing.assert_allclose(effective(result), dense_sum(factors, [0.5, 0.5]), atol=1e-12)


def test_product_mean_fills_up_to_the_rank_asked_for() -> None:
    factors = draw(7, [2], [1.0])
    left = product_mean(sites(factors), None, 6, 2.0, "left")["site"]
    assert left.rank == 6
    assert_orthonormal(left.B)
    wide = product_mean(sites(factors), None, 20, 2.0, "balanced")["site"]
    assert wide.A.shape == (20, K)
    assert wide.B.shape == (D, 20)
    for each in (left, wide):
        np.testing.assert_allclose(effective(each), effective(factors[0]), atol=1e-12)


def test_product_mean_refuses() -> None:
    factors = draw(7, [2], [1.0])
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(AdapterError, match="Scale"):
            product_mean(sites(factors), None, 2, bad)
    with pytest.raises(AdapterError, match="Rank 0"):
        product_mean(sites(factors), None, 0, 1.0)
    with pytest.raises(AdapterError, match="'middle'"):
        product_mean(sites(factors), None, 2, 1.0, "middle")  # type: ignore[arg-type]
    factors[0].A[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        product_mean(sites(factors), None, 2, 1.0)
    with pytest.raises(AdapterError, match="NaN"):
        product_svd(factors)
    with pytest.raises(AdapterError, match="one finite weight"):
        product_svd(draw(7, [2], [1.0]), [1.0, 2.0])


@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_compact_is_exact(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = Factors(
        torch.randn(40, K, generator=generator, dtype=torch.float64),
        torch.randn(D, 40, generator=generator, dtype=torch.float64),
        scale,
    )
    result = compact({"site": wide})["site"]
    assert result.rank == K
    np.testing.assert_allclose(effective(result), effective(wide), atol=1e-11)
    best_two = compact({"site": wide}, 2)["site"]
    assert best_two.rank == 2
    np.testing.assert_allclose(effective(best_two), best(effective(wide), 2), atol=1e-11)


def test_compact_finds_the_true_rank_and_leaves_the_compact_alone() -> None:
    one = draw(0, [3], [1.0])[0]
    double = Factors(torch.cat([one.A, one.A]), torch.cat([one.B, one.B], 1), 1.0)
    result = compact({"site": double})["site"]
    assert result.rank == 3
    np.testing.assert_allclose(effective(result), effective(double), atol=1e-12)
    assert compact({"site": one})["site"] is one
    zero = compact({"site": Factors(torch.zeros(4, K), torch.zeros(D, 4), 1.0)})["site"]
    assert zero.rank == 1
    assert not effective(zero).any()


# ------------------------------------------------------------ dead directions
@pytest.mark.parametrize("rank", [2, 6, 12])  # none dead, some, and more than the layer has (9)
@pytest.mark.parametrize("rows", [None, 4])
def test_no_module_is_zero_in_both_factors(rank: int, rows: int | None) -> None:
    """Two modules arrive: those beyond start from the given rows of A, or from rows of that length."""
    factors = draw(7, [2], [1.0])
    start = None if rows is None else torch.arange(rows * K, dtype=torch.float32).reshape(rows, K)
    result = truncated(factors, None, rank, 2.0, start=start)
    assert result.rank == rank
    np.testing.assert_allclose(effective(result), effective(factors[0]), atol=1e-12)
    assert bool(result.B[:, :2].any(0).all())
    assert not result.B[:, 2:].any()
    for number in range(2, rank):
        if start is not None and number < len(start):
            assert torch.equal(result.A[number], start[number].double())
        else:
            assert float(result.A[number].norm()) == pytest.approx(3**-0.5)


def test_a_zero_update_starts_from_the_given_rows() -> None:
    zero = Factors(torch.randn(3, K), torch.zeros(D, 3), 1.0)
    start = torch.randn(3, K)
    result = truncated([zero], None, 3, 1.0, start=start)
    assert torch.equal(result.A, start)
    assert result.A.dtype == torch.float32
    assert not result.B.any()


@pytest.mark.parametrize("split", ["left", "right", "balanced"])
def test_the_leading_modules_at_another_scale_keep_their_split(split: Split) -> None:
    factors = draw(5, [4, 3], [1.0, 2.0])
    whole = truncated(factors, None, 5, 2.0, split)
    part, alone = leading(whole, 2, 0.5, split), truncated(factors, None, 2, 0.5, split)
    assert (part.rank, part.scale) == (2, 0.5)
    torch.testing.assert_close(part.A, alone.A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part.B, alone.B, rtol=1e-12, atol=1e-12)


def test_the_leading_modules_at_their_own_scale_are_views() -> None:
    """Two clients of one rank share them, which is how a cohort knows that they are the same."""
    whole = truncated(draw(5, [4, 3], [1.0, 2.0]), None, 5, 2.0)
    one, two = leading(whole, 2, 2.0), leading(whole, 2, 2.0)
    assert one.A.data_ptr() == two.A.data_ptr() == whole.A.data_ptr()
    assert one.B.data_ptr() == two.B.data_ptr() == whole.B.data_ptr()


def test_lean_shrinks_only_what_is_larger_than_the_layer() -> None:
    small, large = draw(1, [4, 11], [1.0, 1.0])
    result = lean({"small": small, "large": large})
    assert result["small"] is small
    assert result["large"].rank == K
    np.testing.assert_allclose(effective(result["large"]), effective(large), atol=1e-11)
