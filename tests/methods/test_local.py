"""Local-LoRA: nothing travels, and every client trains with its own rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import (
    Opened,
    adapter,
    exports,
    info,
    method,
    refuses_to_send,
    resumes,
    same,
    sent,
    setting,
    watched,
)
from tests.tiny import tiny_job

from fedgrove.methods.contract import reveal
from fedgrove.methods.records import Nothing, Own
from fedgrove.start import run

JOB: dict[str, Any] = {"method": {"name": "local"}, "run": {"rounds": 2}}


def test_a_client_starts_from_the_shared_draw_of_its_rank_and_goes_on_from_its_own() -> None:
    ours, client = method("local"), info("a", rank=2)
    (first,) = ours.plan(client, Nothing(), Own(), 1)
    assert same(first.assembly.adapter("own"), setting().shared_draw(2))
    (second,) = ours.plan(client, Nothing(), Own(adapter(1, rank=2)), 2)
    assert same(second.assembly.adapter("own"), adapter(1, rank=2))
    assert {term.home for term in second.assembly.terms} == {"client"}


def test_nothing_travels_and_what_trained_stays_sealed(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = watched(monkeypatch)
    run(tiny_job(tiny_bert, silos, federation={"ranks": [1, 2, 3]}, **JOB), tmp_path / "out")
    assert set(sent(tmp_path / "out", "site-0")) == {(0, 0)}
    assert wire.private
    assert not wire.leaks()
    refuses_to_send(wire.kept[0])
    ranks = [next(iter(reveal(kept).own.values())).rank for kept in wire.kept[:3]]
    assert ranks == [1, 2, 3]


def test_clients_learn_nothing_from_each_other(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """A client's model is the same whoever else takes part."""
    opened = exports(tiny_bert, silos, tmp_path / "all", **JOB)
    alone = tiny_job(
        tiny_bert, silos, federation={"held_out": ["site-1", "site-2"], "min_clients": 1}, **JOB
    )
    other = Opened(alone, run(alone, tmp_path / "alone").path)
    one, two = (each.assembly("site-0").adapter("own") for each in (opened, other))
    for site in one:
        torch.testing.assert_close(reveal(one[site].B), reveal(two[site].B), rtol=0, atol=1e-5)


def test_a_run_resumes(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, silos, tmp_path, [(1, 1)], **JOB)
