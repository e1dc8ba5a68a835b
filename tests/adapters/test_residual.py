import numpy as np
import pytest
import torch

from fedgrove.adapters import algebra
from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.residual import fair_correction, fedex_residual
from fedgrove.ground.errors import AdapterError

D, K = 14, 11


def draw(
    seed: int, rank: int = 3, size: float = 1.0, dtype: torch.dtype = torch.float64
) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, K, generator=generator, dtype=torch.float64)
    b = size * torch.randn(D, rank, generator=generator, dtype=torch.float64)
    return Factors(a.to(dtype), b.to(dtype), 2.0)


def dense(f: Factors) -> np.ndarray:
    return np.asarray(f.scale * f.B.double().numpy() @ f.A.double().numpy())


def clients(size: float) -> list[Adapter]:
    return [{"site": draw(seed, size=size)} for seed in range(4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mean_and_residual_are_the_exact_mean_of_the_products(dtype: torch.dtype) -> None:
    adapters = [{"site": draw(seed, dtype=dtype)} for seed in range(5)]
    n = [5.0, 1.0, 2.0, 1.0, 1.0]
    residual = fedex_residual(adapters, n)["site"]
    want = sum(w / 10 * dense(each["site"]) for w, each in zip(n, adapters, strict=True))
    got = dense(algebra.mean(adapters, n)["site"]) + dense(residual)
    np.testing.assert_allclose(got, want, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert np.linalg.norm(dense(residual)) > 0.1
    assert residual.rank <= min(D, K)
    assert (
        fedex_residual(adapters[:2])["site"].rank == 3
    )  # of 9 stacked modules: (B_1 - B_2)(A_1 - A_2) / 4
    assert residual.A.dtype == residual.B.dtype == dtype


def test_equal_clients_leave_no_residual_and_mixed_ones_are_refused() -> None:
    one = {"site": draw(0)}
    assert np.abs(dense(fedex_residual([one, one, one])["site"])).max() < 1e-14
    with pytest.raises(AdapterError, match="ranks"):
        fedex_residual([one, {"site": draw(1, 2)}])


def objective(delta: Factors, mean: Factors, change: torch.Tensor, lam: float) -> float:
    w, x = dense(delta), (mean.B.double() + change.double()).numpy() @ mean.A.double().numpy()
    cosine = (w * x).sum() / np.linalg.norm(w) / np.linalg.norm(x)
    return float(1 - cosine + lam * np.linalg.norm(change.double().numpy()))


def setting(size: float = 1.0) -> tuple[Factors, Factors]:
    adapters = clients(size)
    return algebra.concat(adapters, [0.25] * 4)["site"], algebra.mean(adapters)["site"]


@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_without_penalty_the_cosine_reaches_its_ceiling(size: float) -> None:
    """methods.md: as lam -> 0 the cosine reaches ||dW P|| / ||dW||, P the projector on the mean A's
    row space.
    """
    delta, mean = setting(size)
    w, a = dense(delta), mean.A.numpy()
    ceiling = np.linalg.norm(w @ np.linalg.pinv(a) @ a) / np.linalg.norm(w)
    change = fair_correction(delta, mean, lam=0.0, lr=0.1, tol=0.0, max_steps=4000)
    assert 1 - objective(delta, mean, torch.zeros_like(change), 0.0) < ceiling - 0.01
    assert 1 - objective(delta, mean, change, 0.0) == pytest.approx(ceiling, abs=1e-6)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("lam", [0.01, 1.0])
def test_the_default_never_makes_the_objective_worse(size: float, lam: float) -> None:
    delta, mean = setting(size)
    change = fair_correction(delta, mean, lam=lam)
    before, after = (
        objective(delta, mean, each, lam) for each in (torch.zeros_like(change), change)
    )
    assert after <= before
    if lam < 1:
        assert after < before - 1e-3


def test_steps_are_plain_gradient_descent() -> None:
    """Three steps with autograd on the dense objective: no other optimiser, no dense-free shortcut
    gone wrong.
    """
    delta, mean = setting()
    w = torch.tensor(dense(delta))
    change = torch.zeros_like(mean.B).requires_grad_()
    for step in range(3):
        x = (mean.B + change) @ mean.A
        loss = 1 - (w * x).sum() / w.norm() / x.norm()
        if step:
            loss = loss + 0.01 * change.norm()  # ||.|| has no slope at the start
        (slope,) = torch.autograd.grad(loss, change)
        change = (change - 0.5 * slope).detach().requires_grad_()
    got = fair_correction(delta, mean, lam=0.01, lr=0.5, tol=0.0, max_steps=3)
    torch.testing.assert_close(got, change.detach(), rtol=1e-10, atol=1e-12)


def test_scales_do_not_matter_and_a_large_tolerance_stops_at_once() -> None:
    delta, mean = setting()
    other = fair_correction(
        Factors(delta.A, delta.B, 7.0),
        Factors(mean.A, mean.B, 0.1),
        lam=0.01,
        lr=0.05,
        max_steps=50,
    )
    torch.testing.assert_close(other, fair_correction(delta, mean, lam=0.01, lr=0.05, max_steps=50))
    one = fair_correction(delta, mean, max_steps=1)
    assert torch.equal(fair_correction(delta, mean, tol=10.0), one)
    assert not torch.equal(fair_correction(delta, mean), one)


def test_undefined_cosines_and_bad_settings() -> None:
    delta, mean = setting()
    zero = Factors(delta.A, torch.zeros_like(delta.B), 1.0)
    assert not fair_correction(zero, mean).any()
    assert not fair_correction(delta, Factors(mean.A, torch.zeros_like(mean.B), 1.0)).any()
    assert (
        fair_correction(*(f.map(torch.Tensor.float) for f in (delta, mean))).dtype == torch.float32
    )
    with pytest.raises(AdapterError, match="same site"):
        fair_correction(delta, Factors(mean.A[:, :5], mean.B, 1.0))
    with pytest.raises(AdapterError, match="lr"):
        fair_correction(delta, mean, lr=0.0)
