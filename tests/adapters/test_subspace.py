import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgrove.adapters import subspace
from fedgrove.ground.errors import AdapterError


def draw(
    seed: int, count: int, out: int = 20, rank: int = 3, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(out, rank, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(count)
    ]


def test_basis_spans_the_leading_left_singular_directions() -> None:
    B = draw(0, 1, rank=5)[0] * torch.tensor([100.0, 1.0, 10.0, 0.1, 3.0])
    u = np.linalg.svd(B.numpy(), full_matrices=False)[0]
    for rank in (1, 3, 5):
        got = subspace.basis(B, rank).numpy()
        np.testing.assert_allclose(got @ got.T, u[:, :rank] @ u[:, :rank].T, atol=1e-10)
    assert subspace.basis(B).shape == (20, 5)


def test_basis_of_a_batch_of_float32() -> None:
    batch = torch.stack(draw(1, 4, dtype=torch.float32))
    result = subspace.basis(batch, 2)
    assert result.dtype == torch.float32
    for one, many in zip(batch, result, strict=True):
        torch.testing.assert_close(subspace.basis(one, 2) @ subspace.basis(one, 2).T, many @ many.T)


def test_basis_of_zero_is_orthonormal_and_bad_input_is_refused() -> None:
    u = subspace.basis(torch.zeros(6, 3))
    torch.testing.assert_close(u.T @ u, torch.eye(3))
    with pytest.raises(AdapterError, match=r"rank 4"):
        subspace.basis(torch.zeros(6, 3), 4)
    with pytest.raises(AdapterError, match="NaN"):
        subspace.basis(torch.full((6, 3), math.nan))


def test_overlap_is_the_sum_of_squared_cosines() -> None:
    angle = 0.3
    e = torch.eye(5, dtype=torch.float64)
    turned = torch.stack([math.cos(angle) * e[0] + math.sin(angle) * e[2], e[1]], 1)
    assert subspace.overlap(e[:, :2], turned) == pytest.approx(1 + math.cos(angle) ** 2, abs=1e-12)
    assert subspace.overlap(e[:, :2], e[:, 2:]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frobenius_distances(dtype: torch.dtype) -> None:
    matrices = draw(2, 9, dtype=dtype)
    want = [
        [float(np.linalg.norm(x.double().numpy() - y.double().numpy())) for y in matrices]
        for x in matrices
    ]
    got = subspace.frobenius_distances(matrices)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


def test_near_duplicates_keep_their_digits() -> None:
    """Float32 B's that differ in the last bits, far from 0 and beside a far outlier: a Gram matrix
    alone cancels.
    """
    start, outlier = 100 + draw(3, 1)[0], draw(4, 1)[0]
    matrices = [(start + 1e-4 * step).float() for step in draw(5, 4)] + [
        outlier.float(),
        outlier.float(),
    ]
    want = [
        [float(np.linalg.norm(x.double().numpy() - y.double().numpy())) for y in matrices]
        for x in matrices
    ]
    got = subspace.frobenius_distances(matrices)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-7)
    assert float(got[4, 5]) == 0.0


def test_cosine_distances() -> None:
    matrices = [
        *draw(6, 5),
        torch.zeros(20, 3, dtype=torch.float64),
        torch.zeros(20, 3, dtype=torch.float64),
    ]
    matrices.append(-2 * matrices[0])
    got = subspace.cosine_distances(matrices).numpy()
    for i, x in enumerate(matrices):
        for j, y in enumerate(matrices):
            size = float(x.norm() * y.norm())
            want = (
                1 - float((x * y).sum()) / size
                if size > 0
                else float(bool(x.any()) != bool(y.any()))
            )
            assert got[i, j] == pytest.approx(want, abs=1e-12)
    assert not np.diag(got).any()


def test_cosine_distances_of_near_duplicates_keep_their_digits() -> None:
    x = torch.zeros(4, 1, dtype=torch.float64)
    x[0] = 1.0
    y = x.clone()
    y[1] = 1e-7
    assert float(subspace.cosine_distances([x, y])[0, 1]) == pytest.approx(0.5e-14, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 9)
)
def test_principal_angle_distances_of_mixed_ranks(seed: int, ranks: list[int], block: int) -> None:
    bases = [np.linalg.qr(draw(seed + n, 1, rank=r)[0].numpy())[0] for n, r in enumerate(ranks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subspace, "_BLOCK", block)
        got = subspace.principal_angle_distances([torch.tensor(u) for u in bases])
    for i, u in enumerate(bases):
        for j, v in enumerate(bases):
            want = 1 - np.linalg.norm(u.T @ v) ** 2 / min(u.shape[1], v.shape[1]) if i != j else 0.0
            assert float(got[i, j]) == pytest.approx(want, abs=1e-12)


def test_principal_angle_distance_is_0_for_one_space_and_1_for_orthogonal_ones() -> None:
    e = torch.eye(6, dtype=torch.float64)
    turned = e[:, :2] @ torch.linalg.qr(draw(8, 1, out=2, rank=2)[0]).Q
    got = subspace.principal_angle_distances([e[:, :2], turned, e[:, :3], e[:, 3:]])
    want = [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


def test_penalty_value_and_gradient() -> None:
    frozen, B = draw(7, 2)
    B = B.requires_grad_()
    penalty = subspace.orthogonal_projector_penalty(frozen, B)
    assert float(penalty.detach()) == pytest.approx(
        np.linalg.norm(frozen.numpy().T @ B.detach().numpy()) ** 2
    )
    (slope,) = torch.autograd.grad(penalty, B)
    torch.testing.assert_close(slope, 2 * frozen @ (frozen.T @ B.detach()))
    u = subspace.basis(frozen)
    inside = (u @ u.T @ B.detach()).norm() ** 2
    torch.testing.assert_close(subspace.orthogonal_projector_penalty(u, B.detach()), inside)


def test_distances_refuse_what_cannot_be_compared() -> None:
    for distances in (subspace.frobenius_distances, subspace.cosine_distances):
        with pytest.raises(AdapterError, match="equal"):
            distances([torch.zeros(4, 2), torch.zeros(4, 3)])
        with pytest.raises(AdapterError, match="Matrix 1 holds NaN"):
            distances([torch.zeros(4, 2), torch.full((4, 2), math.nan)])
        with pytest.raises(AdapterError, match="at least one"):
            distances([])
    with pytest.raises(AdapterError, match="one site at a time"):
        subspace.principal_angle_distances([torch.eye(4), torch.eye(5)])
    with pytest.raises(AdapterError, match="at least one"):
        subspace.principal_angle_distances([])
