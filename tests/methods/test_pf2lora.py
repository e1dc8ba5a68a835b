"""PF2LoRA (2503.03920): the mean of the shared module, what stays, and FedIT without the private
one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import (
    PER_RANK,
    adapter,
    aggregated,
    equal_runs,
    exports,
    info,
    method,
    near,
    refuses_to_send,
    resumes,
    sent,
    update,
    watched,
)
from tests.tiny import tiny_job

from fedgrove.adapters.adapter import Factors
from fedgrove.methods.records import Own
from fedgrove.start import run

JOB: dict[str, Any] = {"method": {"name": "pf2lora"}, "run": {"rounds": 2}}


def test_the_server_takes_the_mean_of_each_factor() -> None:
    ours = method("pf2lora")
    adapters = [adapter(n, size=10.0**n) for n in range(3)]
    state = aggregated(
        ours,
        {"whole": {}},
        1,
        [update(f"c{n}", 10 * (n + 1), adapter=a) for n, a in enumerate(adapters)],
    )
    shares = [1 / 6, 2 / 6, 3 / 6]
    want = {
        site: Factors(
            sum((p * a[site].A for p, a in zip(shares, adapters, strict=True)), torch.zeros(())),
            sum((p * a[site].B for p, a in zip(shares, adapters, strict=True)), torch.zeros(())),
            2.0,
        )
        for site in adapters[0]
    }
    near(state.whole, want)


def test_the_private_steps_come_first_and_train_the_private_module_alone() -> None:
    ours = method("pf2lora", private_rank=2, private_share=0.25)
    client = info("a")
    first, second = ours.plan(client, ours.offer(ours.begin([client]), 1, client), Own(), 1)
    assert {t.name: (t.train, t.home) for t in first.assembly.terms} == {
        "global": ("", "server"),
        "own": ("ABM", "client"),
    }
    assert {t.name: t.train for t in second.assembly.terms} == {"global": "ABM", "own": ""}
    assert (first.share, second.share) == (0.25, 0.75)
    assert (first.carries, second.carries) == ((), ("own",))
    own = first.assembly.adapter("own")
    assert {(f.rank, f.scale) for f in own.values()} == {(2, 2.0)}
    assert all(not f.B.any() and f.A.any() for f in own.values())


def test_without_private_steps_it_is_fedit(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    equal_runs(
        tiny_bert,
        silos,
        tmp_path,
        {"name": "pf2lora", "private_share": 0.0},
        {"name": "fedit"},
        run={"rounds": 2},
    )


def test_a_resumed_run_is_bit_identical(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, silos, tmp_path, [(1, 1), (2, 2)], **JOB)


def test_what_travels_and_what_stays(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = watched(monkeypatch)
    run(tiny_job(tiny_bert, silos, **JOB), tmp_path / "out")
    assert sent(tmp_path / "out", "site-0") == [(4 * 4 * PER_RANK, 4 * 4 * PER_RANK)] * 2
    assert (
        len(wire.private) >= 2 * 3 * 8 - 3
    )  # A and B of four sites, of three clients, in two rounds
    assert not wire.leaks()
    refuses_to_send(wire.kept[0])


def test_the_export_is_the_sum_of_both_modules(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    opened = exports(tiny_bert, silos, tmp_path, **JOB)
    assembly = opened.assembly("site-1")
    assert [t.name for t in assembly.terms] == ["global", "own"]
    other = opened.method.personal(opened.prepared.clients["site-1"], opened.state, Own())
    head = {name: e for name, e in assembly.extras.items() if name.startswith("head.")}
    assert (opened.logits(assembly) - opened.logits(other.with_extras(head))).abs().max() > 1e-6
