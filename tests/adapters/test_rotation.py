import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.rotation import align, rotation
from fedgrove.ground.errors import AdapterError


def draw(seed: int, rank: int = 4, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 9, generator=generator, dtype=torch.float64)
    b = torch.randn(7, rank, generator=generator, dtype=torch.float64)
    return Factors(a.to(dtype), b.to(dtype), 2.0)


def reference(m: np.ndarray, lam: float) -> np.ndarray:
    """The formula of methods.md, literally: M = U S V^T, R* = V diag(1, .., det(U V^T)) U^T, then
    proj_SO.
    """
    u, _, vt = np.linalg.svd(m)
    fix = np.eye(len(m))
    fix[-1, -1] = np.sign(np.linalg.det(u @ vt))
    hard = vt.T @ fix @ u.T
    p, _, qt = np.linalg.svd((1 - lam) * np.eye(len(m)) + lam * hard)
    fix[-1, -1] = np.sign(np.linalg.det(p @ qt))
    return np.asarray(p @ fix @ qt)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0, 1))
def test_rotation_is_the_formula_and_a_rotation(seed: int, rank: int, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    r = rotation(m, lam)
    torch.testing.assert_close(r.T @ r, torch.eye(rank, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(torch.linalg.det(r)) == pytest.approx(1.0, abs=1e-10)
    if abs(lam - 0.5) > 1e-3:  # at 1/2 a half turn has no nearest rotation: any is right
        np.testing.assert_allclose(r.numpy(), reference(m.numpy(), lam), atol=1e-6)


def test_no_strength_or_nothing_to_align_with_is_the_identity() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(rotation(torch.randn(3, 3, generator=generator), 0.0), eye)
    torch.testing.assert_close(rotation(torch.zeros(3, 3), 0.7), eye)


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_alignment_keeps_the_product(factor: str, lam: float) -> None:
    client, last = draw(1), draw(2)
    result = align(client, last, factor, lam)  # type: ignore[arg-type]
    torch.testing.assert_close(result.B @ result.A, client.B @ client.A, atol=1e-12, rtol=1e-12)
    assert result.scale == 2.0


@pytest.mark.parametrize("factor", ["A", "B"])
def test_full_strength_undoes_a_rotation(factor: str) -> None:
    last, angle = draw(3), 1.1
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    turned = Factors(turn @ last.A, last.B @ turn.T, 2.0)
    result = align(turned, last, factor, 1.0)  # type: ignore[arg-type]
    torch.testing.assert_close(result.A, last.A)
    torch.testing.assert_close(result.B, last.B)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_alignment_brings_the_factor_nearer_than_any_other_rotation(factor: str) -> None:
    client, last = draw(4, 2), draw(5, 2)

    def gap(result: Factors) -> Tensor:
        return torch.linalg.norm(getattr(result, factor) - getattr(last, factor))

    best = gap(align(client, last, factor, 1.0))  # type: ignore[arg-type]
    for step in range(60):
        angle = 2 * math.pi * step / 60
        r = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        ).double()
        assert best <= gap(Factors(r.T @ client.A, client.B @ r, 2.0)) + 1e-12


def test_dtype_and_refusals() -> None:
    low = align(draw(1, dtype=torch.bfloat16), draw(2, dtype=torch.bfloat16), "A")
    assert low.A.dtype == low.B.dtype == torch.bfloat16
    with pytest.raises(AdapterError, match="Rank 3"):
        align(draw(1, 3), draw(2, 4), "A")
    with pytest.raises(AdapterError, match="'C'"):
        align(draw(1), draw(2), "C")  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"1\.5"):
        rotation(torch.eye(2), 1.5)
