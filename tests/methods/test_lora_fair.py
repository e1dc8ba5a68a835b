"""LoRA-FAIR: the corrected product points where the exact mean points, as far as the mean of A
allows.
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
    check_run,
    client_draws,
    close,
    dense,
    lines,
    method,
    model,
    sent,
    small_job,
)
from torch import Tensor

EQUAL = (3, 3, 3, 3)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def test_as_lambda_vanishes_the_cosine_reaches_the_projection() -> None:
    chosen = method("lora-fair", rank=3, lam=0.0, lr=0.5, tol=0.0, max_steps=20000)
    adapters = client_draws(chosen, 1.5, EQUAL)
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters))
    plain = fedit_mean(sent(adapters))
    for site in SITES:
        whole, a = dense(adapters, WEIGHTS, site), plain[site].A
        projected = whole @ torch.linalg.pinv(a) @ a
        reached = cosine(model(chosen.global_assembly(state), site), whole)
        assert reached == pytest.approx(float(projected.norm() / whole.norm()), abs=1e-4)
        assert cosine(plain[site].product(), whole) < reached - 0.01
        assert torch.equal(state.whole[site].A, a)


def test_the_correction_lowers_the_papers_objective_and_more_weight_means_less_of_it() -> None:
    sizes = []
    for lam in (0.001, 0.01, 10.0):
        chosen = method("lora-fair", rank=3, lam=lam)
        adapters = client_draws(chosen, 1.0, EQUAL)
        state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters)).whole
        plain = fedit_mean(sent(adapters))
        total = 0.0
        for site in SITES:
            whole, change = dense(adapters, WEIGHTS, site), (state[site].B - plain[site].B).norm()
            before = 1 - cosine(plain[site].product(), whole)
            assert 1 - cosine(state[site].product(), whole) + lam * float(change) <= before + 1e-12
            total += float(change)
        sizes.append(total)
    assert sizes[0] > sizes[1] > sizes[2] == 0.0


def test_without_steps_it_is_fedit() -> None:
    chosen = method("lora-fair", rank=3, max_steps=0)
    adapters = client_draws(chosen, 30.0, EQUAL)
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters)).whole
    plain = fedit_mean(sent(adapters))
    for site in SITES:
        close(state[site].A, plain[site].A)
        close(state[site].B, plain[site].B)


def test_a_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = small_job("lora-fair", tiny_bert, silos, method={"max_steps": 20, "lam": 0.001})
    out = check_run(job, tmp_path)
    for line in lines(out, "train"):
        assert line["bytes_up"] == line["bytes_down"] == 4 * ONE * 4
