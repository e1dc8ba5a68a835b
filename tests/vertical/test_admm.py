"""VIM's updates against dense float64 references, and the identities that the paper's formulas give."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fedgrove.vertical import admm


def batch(rows: int = 7, classes: int = 4, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    sums = torch.randn(rows, classes, generator=draw, dtype=torch.float64) * scale
    duals = torch.randn(rows, classes, generator=draw, dtype=torch.float64) * 0.3
    labels = torch.randint(classes, (rows,), generator=draw)
    return sums, duals, labels


def objective(z: Tensor, sums: Tensor, duals: Tensor, labels: Tensor, rho: float) -> Tensor:
    loss = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    return loss - (duals * z).sum() + rho / 2 * (sums - z).square().sum()


@pytest.mark.parametrize("rho", [0.01, 0.1, 1.0, 10.0])
def test_z_is_the_minimum_that_a_general_optimiser_finds(rho: float) -> None:
    sums, duals, labels = batch()
    found = admm.nearest(sums, duals, labels, rho)

    def value(flat: object) -> tuple[float, object]:
        z = torch.tensor(flat, dtype=torch.float64).reshape(sums.shape).requires_grad_()
        loss = objective(z, sums, duals, labels, rho)
        loss.backward()
        assert z.grad is not None
        return float(loss.detach()), z.grad.flatten().numpy()

    start = sums.flatten().numpy()
    dense = minimize(value, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    assert torch.allclose(found.flatten(), torch.tensor(dense.x), atol=2e-6)
    assert float(objective(found, sums, duals, labels, rho)) <= dense.fun + 1e-10


@pytest.mark.parametrize("rho", [0.01, 1.0])
def test_newtons_direction_is_the_dense_solve(rho: float) -> None:
    sums, _, _ = batch()
    p = sums.softmax(-1)
    slope = torch.randn_like(p)
    dense = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    dense = dense + rho * torch.eye(p.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(dense, slope[..., None])[..., 0]
    assert torch.allclose(admm._solved(p, slope, rho), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 50.0, 1e4])
@pytest.mark.parametrize("rho", [0.01, 0.3, 5.0])
def test_after_the_dual_step_the_multipliers_are_the_residual(rho: float, scale: float) -> None:
    sums, duals, labels = batch(scale=scale)
    z = admm.nearest(sums, duals, labels, rho)
    after = admm.next_duals(duals, sums, z, rho)
    residual = z.softmax(-1) - torch.nn.functional.one_hot(labels, 4)
    assert torch.allclose(after, residual, atol=1e-9)


def test_twelve_steps_do_where_rho_is_not_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admm, "STEPS", 12)
    sums, duals, labels = batch(rows=200, scale=6.0)
    for rho in (0.01, 0.1, 1.0):
        z = admm.nearest(sums, duals, labels, rho)
        after = admm.next_duals(duals, sums, z, rho)
        residual = z.softmax(-1) - torch.nn.functional.one_hot(labels, 4)
        assert torch.allclose(after, residual, atol=1e-8)


def test_the_first_gradient_in_a_share_is_twice_the_new_multipliers_less_the_old() -> None:
    sums, duals, labels = batch()
    rho = 0.7
    share = (sums * 0.4).requires_grad_()
    z = admm.nearest(sums, duals, labels, rho)
    after = admm.next_duals(duals, sums, z, rho)
    rest = sums - share.detach() - z
    admm.objective(share, after, rest, rho).backward()
    assert share.grad is not None
    assert torch.allclose(share.grad * len(sums), 2 * after - duals, atol=1e-12)


# ------------------------------------------------------- exact steps of linear parties
def exact(
    parts: list[Tensor],
    labels: Tensor,
    *,
    rho: float,
    ridge: float,
    rounds: int,
    prox: bool,
) -> list[Tensor]:
    """ADMM whose parties' own problems are solved exactly, all at the same time."""
    rows = len(labels)
    classes = int(labels.max()) + 1
    weights = [torch.zeros(part.shape[1], classes, dtype=torch.float64) for part in parts]
    duals = torch.zeros(rows, classes, dtype=torch.float64)
    extra = (len(parts) - 1) * rho if prox else 0.0
    for round in range(rounds):
        shares = [part @ weight for part, weight in zip(parts, weights, strict=True)]
        sums = torch.stack(shares).sum(0)
        z = admm.nearest(sums, duals, labels, rho)
        duals = admm.next_duals(duals, sums, z, rho)
        for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
            rest = sums - share - z
            left = (rho + extra) * part.T @ part / rows
            left = left + ridge * torch.eye(part.shape[1], dtype=torch.float64)
            right = part.T @ (extra * share - duals - rho * rest) / rows
            weights[number] = torch.linalg.solve(left, right)
            checked = number == 0 and round % 50 == 0
            if checked:
                assert slope_at(weights[number], part, share, duals, rest, rho, extra, ridge) < 1e-8
    return weights


def slope_at(
    weight: Tensor,
    part: Tensor,
    first: Tensor,
    duals: Tensor,
    rest: Tensor,
    rho: float,
    extra: float,
    ridge: float,
) -> float:
    """Of the very objective that the parties' gradient steps lower, where the exact step ended."""
    leaf = weight.clone().requires_grad_()
    own = part @ leaf
    loss = admm.objective(own, duals, rest, rho) + admm.damping(own, first, extra)
    loss = loss + ridge / 2 * leaf.square().sum()
    (slope,) = torch.autograd.grad(loss, leaf)
    return float(slope.abs().max())


def pooled(x: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """Multinomial logistic regression on all columns, by Newton on the dense Hessian."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(x.shape[1] * classes, dtype=torch.float64)

    def value(flat: Tensor) -> Tensor:
        logits = x @ flat.reshape(x.shape[1], classes)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return loss + ridge / 2 * flat.square().sum()

    for _ in range(30):
        leaf = weight.requires_grad_()
        (slope,) = torch.autograd.grad(value(leaf), leaf)
        p = (x @ weight.detach().reshape(x.shape[1], classes)).softmax(-1)
        curved = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("nd,nce,nf->dcfe", x, curved, x).reshape(len(leaf), -1) / len(x)
        hessian = hessian + ridge * torch.eye(len(leaf), dtype=torch.float64)
        weight = weight.detach() - torch.linalg.solve(hessian, slope)
    return weight.reshape(x.shape[1], classes)


def planted(rows: int = 60) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=draw, dtype=torch.float64)
    logits = x @ torch.randn(6, 3, generator=draw, dtype=torch.float64)
    noise = torch.randn(rows, 3, generator=draw, dtype=torch.float64)
    return x, (logits + noise).argmax(-1)


def test_exact_steps_of_linear_parties_end_at_pooled_logistic_regression() -> None:
    x, labels = planted()
    parts = list(x.split([2, 3, 1], dim=1))
    weights = exact(parts, labels, rho=0.3, ridge=0.05, rounds=1500, prox=True)
    expected = pooled(x, labels, ridge=0.05)
    assert torch.allclose(torch.cat(weights), expected, atol=1e-12)


def test_redundant_parties_overshoot_together_unless_damped() -> None:
    x, labels = planted()
    parts = [x] * 14
    ridge = 0.05
    expected = pooled(torch.cat(parts, 1)[:, :6] * 14**0.5, labels, ridge) * 14**0.5

    def miss(prox: bool, rounds: int) -> float:
        weights = exact(parts, labels, rho=0.1, ridge=ridge, rounds=rounds, prox=prox)
        whole = torch.stack(weights).sum(0)
        return float((whole - expected).abs().max())

    assert miss(False, 60) > 0.1
    assert miss(True, 700) < 1e-3


def test_a_party_of_noise_has_the_least_norm() -> None:
    x, labels = planted(200)
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    parts = [x[:, :3], noise, x[:, 3:]]
    weights = exact(parts, labels, rho=0.3, ridge=0.01, rounds=300, prox=True)
    norms = [float(weight.norm()) for weight in weights]
    assert norms[1] == min(norms)
    assert norms[1] < min(norms[0], norms[2]) / 2
