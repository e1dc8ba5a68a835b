"""What a client's personal model is made of is asked once: measured and taken home alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_job, without_reports

from fedgrove.adapters.tree import map_tensors
from fedgrove.interop.peft import read_adapter
from fedgrove.methods import registry
from fedgrove.methods.contract import ClientInfo, State
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.registry import register
from fedgrove.start import run
from fedgrove.tracking.metrics import read
from fedgrove.use.adapt import adapt


@pytest.fixture
def halved() -> Iterator[str]:
    """FedIT, of which clients deploy half of what they would train on."""

    class Halved(FedIT):
        name = "halved"
        title = "Halved"

        def deploy(self, state: State, round: int, client: ClientInfo) -> Any:
            return map_tensors(super().deploy(state, round, client), lambda value: value / 2)

    register(Halved)
    yield "halved"
    registry.METHODS.forget()


def losses(out: Path) -> dict[str, float]:
    """Of the last round, by client."""
    lines = [line for line in read(out / "metrics.jsonl") if line["split"] == "test"]
    last = max(line["round"] for line in lines)
    return {line["client"]: line["loss"] for line in lines if line["round"] == last}


def test_a_client_leaves_with_the_model_that_was_measured(
    halved: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    federation = {"held_out": ["site-2"]}
    method = {"name": halved}
    with without_reports():
        run(tiny_job(tiny_bert, silos, method=method, federation=federation), out)
    rows = json.loads((out / "summary.json").read_text())["clients"]
    last = losses(out)
    assert sorted(last) == ["site-0", "site-1"]
    assert last == {name: rows[name]["loss"] for name in last}
    # the global model is not halved, what everyone deploys is, a newcomer's too
    whole, *deployed = (
        read_adapter(out / "adapters" / name)[0] for name in ("_global", "site-0", "site-2")
    )
    table = silos / "site-2.jsonl"
    deployed.append(read_adapter(adapt(out, table, name="late", epochs=0).path)[0])
    for adapter in deployed:
        for site, factors in adapter.items():
            assert whole[site].B.abs().max() > 0
            assert torch.equal(factors.A, whole[site].A / 2)
            assert torch.equal(factors.B, whole[site].B / 2)
