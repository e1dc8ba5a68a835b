"""FFA-LoRA: A is frozen at the shared draw, so the mean of B is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.methods.kit import (
    PER_RANK,
    SITES,
    adapter,
    aggregated,
    exports,
    info,
    method,
    resumes,
    same,
    sent,
    setting,
    update,
)

from fedgrove.methods._halves import OneFactor, OwnFactor
from fedgrove.methods.protocols import global_assembly

JOB: dict[str, Any] = {"method": {"name": "ffa-lora"}, "run": {"rounds": 2}}


def test_the_mean_of_b_is_the_mean_of_the_products() -> None:
    ours, draw = method("ffa-lora"), setting().shared_draw()
    halves = [{site: f.B for site, f in adapter(n, size=100.0**n).items()} for n in range(3)]
    arrived = [update(f"c{n}", n + 1, half=half) for n, half in enumerate(halves)]
    state = aggregated(ours, ours.begin([]), 1, arrived)
    model = global_assembly(ours, state)
    assert model is not None
    for site in SITES:
        A = draw[site].A.double()
        shares = zip((1 / 6, 2 / 6, 3 / 6), halves, strict=True)
        want = sum((p * 2.0 * half[site] @ A for p, half in shares), torch.zeros(()))
        found = model.adapter("adapter")[site]
        torch.testing.assert_close(found.scale * found.B @ found.A.double(), want)


def test_a_client_trains_b_alone_on_the_drawn_a() -> None:
    ours, client = method("ffa-lora"), info("a")
    offer = OneFactor({site: f.B for site, f in adapter(4).items()})
    (step,) = ours.plan(client, offer, OwnFactor(), 1)
    term = step.assembly.term("adapter")
    assert (term.train, term.kept, term.home) == ("BM", "", "server")
    for site, factors in setting().shared_draw().items():
        assert torch.equal(term.adapter[site].A, factors.A)
        assert torch.equal(term.adapter[site].B, offer.half[site])


def test_a_run_resumes_and_sends_b_alone(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, silos, tmp_path, [(1, 1)], **JOB)
    half = 4 * 4 * PER_RANK // 2
    assert set(sent(tmp_path / "whole", "site-0")) == {(half, half)}


def test_the_export_gives_the_logits_of_the_run_on_the_drawn_a(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    opened = exports(tiny_bert, silos, tmp_path, **JOB)
    found = opened.assembly("site-0").adapter("adapter")
    drawn = opened.method.setting.shared_draw()
    assert all(torch.equal(found[site].A, drawn[site].A) for site in drawn)
    assert not same(found, drawn)
