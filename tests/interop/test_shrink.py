"""Adapters of a smaller rank, against dense float64 SVDs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedgrove.adapters import Adapter, Factors
from fedgrove.ground.errors import RunError
from fedgrove.interop.peft import read_adapter, save_adapter
from fedgrove.interop.shrink import Loss, read_loss, write_truncated


def dense(factors: Factors) -> torch.Tensor:
    return factors.scale * factors.B.double() @ factors.A.double()


def adapter() -> Adapter:
    draw = torch.Generator().manual_seed(0)
    return {
        "a.query": Factors(
            torch.randn(6, 9, generator=draw), torch.randn(7, 6, generator=draw), 0.5
        ),
        "a.value": Factors(
            torch.randn(2, 9, generator=draw), torch.randn(5, 2, generator=draw), 2.0
        ),
    }


def saved(folder: Path) -> Path:
    card = {"head": "pooled", "tiers": {"root": 6}}
    save_adapter(folder, adapter(), base="b", head={}, head_kind="pooled", card=card)
    return folder


def test_the_best_approximation_and_its_error(tmp_path: Path) -> None:
    loss = write_truncated(saved(tmp_path / "x"), tmp_path / "y", 3)
    small, _, config = read_adapter(tmp_path / "y")
    assert config["r"] == 3
    lost = whole = 0.0
    for name, factors in adapter().items():
        u, s, vh = torch.linalg.svd(dense(factors))
        best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
        assert torch.allclose(dense(small[name]), best, atol=1e-5)
        assert small[name].rank == min(3, factors.rank)
        lost += float((dense(factors) - best).square().sum())
        whole += float(dense(factors).square().sum())
    assert loss.error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    query = adapter()["a.query"]
    s = torch.linalg.svdvals(dense(query))
    assert loss.site == "a.query"
    assert loss.worst == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-6)
    assert read_loss(tmp_path / "y") == loss


def test_a_rank_that_is_enough_changes_nothing(tmp_path: Path) -> None:
    loss = write_truncated(saved(tmp_path / "x"), tmp_path / "y", 6)
    assert loss == Loss(6, 0.0, "a.query", 0.0)
    small, _, _ = read_adapter(tmp_path / "y")
    assert all(torch.equal(small[name].A, factors.A) for name, factors in adapter().items())


def test_what_has_no_rank_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "fedgrove.json").write_text('{"peft": false, "why": "It is gated."}')
    with pytest.raises(RunError, match="It is gated"):
        write_truncated(tmp_path / "x", tmp_path / "y", 3)
