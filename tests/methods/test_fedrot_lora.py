"""FedRot-LoRA: the rotation of the paper, written out; no product changes; both places give the
same bits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.methods.kit import aggregated, fedit_mean
from tests.methods.rules import (
    CLIENTS,
    ONE,
    SITES,
    WEIGHTS,
    adapter_files,
    check_run,
    client_draws,
    close,
    draw,
    lines,
    method,
    sent,
    small_job,
)
from torch import Tensor

from fedgrove.adapters import Adapter, Assembly, Factors, Term
from fedgrove.methods.contract import Trained
from fedgrove.methods.fedrot_lora import FedRotLoRA
from fedgrove.methods.records import Whole
from fedgrove.start import run

EQUAL = (3, 3, 3, 3)


def soft(m: Tensor, lam: float) -> Tensor:
    """``proj_SO((1 - lam) I + lam V diag(1, .., det(U V^T)) U^T)`` of ``m = U S V^T``."""

    def special(u: Tensor, vh: Tensor) -> Tensor:
        flip = torch.eye(len(m), dtype=m.dtype)
        flip[-1, -1] = torch.linalg.det(u @ vh)
        return flip

    u, _, vh = torch.linalg.svd(m)
    x = (1 - lam) * torch.eye(len(m), dtype=m.dtype) + lam * vh.T @ special(u, vh) @ u.T
    p, _, qh = torch.linalg.svd(x)
    return p @ special(p, qh) @ qh


def uploaded(chosen: FedRotLoRA, adapter: Adapter, reference: Adapter, round: int) -> Adapter:
    done = Trained(Assembly((Term("global", adapter),)), 0.0, 1)
    content, _ = chosen.report(CLIENTS[0], [done], Whole(reference), {}, round)
    return content.adapter


@pytest.mark.parametrize("stretch", [1.0, 30.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_mean_is_of_rotated_factors_and_no_product_changes(lam: float, stretch: float) -> None:
    chosen, reference = method("fedrot-lora", rank=3, lam=lam), draw(50, 3)
    adapters = client_draws(chosen, stretch, EQUAL)
    for round in (2, 3, 4):
        mine = [uploaded(chosen, adapter, reference, round) for adapter in adapters]
        after = aggregated(chosen, Whole(reference), round, sent(mine)).whole
        for site in SITES:
            ref = reference[site]
            a, b = torch.zeros_like(ref.A), torch.zeros_like(ref.B)
            for adapter, rotated, weight in zip(adapters, mine, WEIGHTS, strict=True):
                f = adapter[site]
                close(rotated[site].product(), f.product())
                r = soft(ref.B.T @ f.B if round % 2 else ref.A @ f.A.T, lam)
                a += weight * r.T @ f.A
                b += weight * f.B @ r
            close(after[site].A, a, 1e-10)
            close(after[site].B, b, 1e-10)


def test_the_second_round_aligns_a_and_the_third_b() -> None:
    """As the authors' code, whose state counts from 0: odd states align A, from state 1 on."""
    chosen, reference = method("fedrot-lora", rank=3, lam=1.0), draw(50, 3)
    (adapter,) = client_draws(chosen, 1.0, (3,))
    second = uploaded(chosen, adapter, reference, 2)
    third = uploaded(chosen, adapter, reference, 3)
    for site, f in adapter.items():
        ref = reference[site]

        def apart(sent: Factors, factor: str, ref: Factors = ref) -> float:
            return float((getattr(sent, factor) - getattr(ref, factor)).norm())

        assert apart(second[site], "A") < min(apart(third[site], "A"), apart(f, "A")) - 1e-3
        assert apart(third[site], "B") < min(apart(second[site], "B"), apart(f, "B")) - 1e-3


def test_the_full_rotation_undoes_a_rotation() -> None:
    """Clients that differ from the global adapter by a rotation alone are averaged without loss."""
    chosen, reference, mine = method("fedrot-lora", rank=3, lam=1.0), draw(50, 3), []
    for n in range(4):
        turn = soft(
            torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n)), 1.0
        )
        turned = {s: Factors(turn.T @ f.A, f.B @ turn, f.scale) for s, f in reference.items()}
        mine.append(uploaded(chosen, turned, reference, 3))
    after = aggregated(chosen, Whole(reference), 3, sent(mine)).whole
    plain = fedit_mean(sent(mine))
    for site in SITES:
        close(after[site].A, reference[site].A)
        close(after[site].B, reference[site].B)
        close(plain[site].A, reference[site].A)


def test_the_first_round_and_strength_zero_are_fedit() -> None:
    reference = draw(50, 3)
    for lam, round in ((0.5, 1), (0.0, 2), (0.0, 3)):
        chosen = method("fedrot-lora", rank=3, lam=lam)
        adapters = client_draws(chosen, 30.0, EQUAL)
        mine = [uploaded(chosen, adapter, reference, round) for adapter in adapters]
        plain = fedit_mean(sent(adapters))
        for site, f in aggregated(chosen, Whole(reference), round, sent(mine)).whole.items():
            close(f.A, plain[site].A)
            close(f.B, plain[site].B)


def test_a_run_is_the_same_wherever_the_rotation_is(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = small_job("fedrot-lora", tiny_bert, silos)
    out = check_run(job, tmp_path)
    for line in lines(out, "train"):
        assert line["bytes_up"] == line["bytes_down"] == 4 * ONE * 4
    run(job.override(["method.at=server"]), tmp_path / "server")
    assert adapter_files(tmp_path / "server") == adapter_files(out)
    run(job.override(["method.lam=0.0"]), tmp_path / "none")
    assert adapter_files(tmp_path / "none") != adapter_files(out)
