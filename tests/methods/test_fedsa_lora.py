"""FedSA-LoRA: A is averaged, B stays with the client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import (
    PER_RANK,
    SITES,
    adapter,
    aggregated,
    exports,
    info,
    method,
    refuses_to_send,
    resumes,
    sent,
    setting,
    update,
    watched,
)
from tests.tiny import tiny_job

from fedgrove.methods._halves import OneFactor, OwnFactor
from fedgrove.methods.contract import keep, reveal
from fedgrove.methods.protocols import global_assembly
from fedgrove.start import run

JOB: dict[str, Any] = {"method": {"name": "fedsa-lora"}, "run": {"rounds": 2}}


def test_the_shared_factor_is_the_weighted_mean_and_there_is_no_one_model() -> None:
    ours = method("fedsa-lora")
    halves = [{site: f.A for site, f in adapter(n, size=100.0**n).items()} for n in range(3)]
    arrived = [update(f"c{n}", n + 1, half=half) for n, half in enumerate(halves)]
    state = aggregated(ours, ours.begin([]), 1, arrived)
    for site in SITES:
        shares = zip((1 / 6, 2 / 6, 3 / 6), halves, strict=True)
        want = sum((p * half[site] for p, half in shares), torch.zeros(()))
        torch.testing.assert_close(state.half[site], want, rtol=1e-12, atol=1e-12)
    assert global_assembly(ours, state) is None


def test_a_client_joins_the_offered_a_and_its_own_b() -> None:
    ours, client, drawn = method("fedsa-lora"), info("a"), setting().shared_draw()
    offer = OneFactor({site: f.A for site, f in adapter(4).items()})
    kept = keep(OwnFactor({site: f.B for site, f in adapter(5).items()}))
    for mine, own in ((OwnFactor(), drawn), (kept, adapter(5))):
        (step,) = ours.plan(client, offer, mine, 1)
        term = step.assembly.term("adapter")
        assert (set(term.train), term.kept, term.home) == (set("ABM"), "BM", "server")
        for site, factors in term.adapter.items():
            assert torch.equal(factors.A, offer.half[site])
            assert torch.equal(factors.B, own[site].B)


def test_only_the_shared_factor_travels_and_the_other_stays_sealed(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = watched(monkeypatch)
    run(tiny_job(tiny_bert, silos, **JOB), tmp_path / "out")
    half = 4 * 4 * PER_RANK // 2
    assert set(sent(tmp_path / "out", "site-0")) == {(half, half)}
    assert wire.private
    assert not wire.leaks()
    refuses_to_send(wire.kept[0])


def test_a_run_resumes(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, silos, tmp_path, [(1, 1)], **JOB)


def test_the_export_holds_the_shared_factor_and_each_clients_own(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    opened = exports(tiny_bert, silos, tmp_path, **JOB)
    one, two = (opened.assembly(name).adapter("adapter") for name in ("site-0", "site-1"))
    for site in one:
        assert torch.equal(one[site].A, two[site].A)
        assert not torch.equal(reveal(one[site].B), reveal(two[site].B))
