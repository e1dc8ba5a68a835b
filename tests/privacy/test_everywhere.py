"""Example-level privacy holds wherever training touches a client's data, not in rounds alone.

With plain gradient descent and a clip of 1e-9 a private step moves a weight by less than 1e-10, so
whatever moves was trained past the guard. The control without the clip moves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.tiny import save_silos, sentences, tiny_job

from fedgrove.cli import main
from fedgrove.engines.local import prepare
from fedgrove.ground.errors import RunError
from fedgrove.interop.peft import read_adapter
from fedgrove.privacy import accountant
from fedgrove.start import run
from fedgrove.use.adapt import adapt

__all__ = ["virtual"]
STILL = 1e-7  # float32 rounds a head by less
CLIPPED = {"example_clip": 1e-9, "randomness": "seed"}
SITES = [f"site-{number}" for number in range(4)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("everywhere") / "silos", clients=4, rows=16)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("everywhere") / "clinic-9.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in sentences(40, seed=99)) + "\n")
    return path


def job_of(bert: Path, silos: Path, /, **changes: Any) -> Any:
    train = {"optimizer": "sgd", "lr": 0.5, "final_local_epochs": 1, "cohort": 1}
    changes.setdefault("privacy", CLIPPED)
    return tiny_job(
        bert,
        silos,
        **changes,
        train={**train, **changes.pop("train", {})},
        run={"rounds": 3},
    )


def numbers(folder: Path) -> torch.Tensor:
    """Everything that a client took home: its effective update, its A, and its head."""
    adapter, head, _ = read_adapter(folder)
    parts = [part for factors in adapter.values() for part in (factors.product(), factors.A)]
    return torch.cat([each.flatten().double() for each in (*parts, *head.values())])


def moved(one: Path, other: Path) -> float:
    return float((numbers(one) - numbers(other)).abs().max())


def card(folder: Path) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((folder / "fedgrove.json").read_text())
    return found


# ------------------------------------------------------------ a run
@pytest.mark.parametrize("engine", ["local", "flower"])
@pytest.mark.parametrize("head", ["local", "shared"])
@pytest.mark.parametrize("private", [True, False])
def test_rounds_and_fine_tuning_move_nothing(
    private: bool,
    head: str,
    engine: str,
    virtual: None,
    tiny_bert: Path,
    four: Path,
    tmp_path: Path,
) -> None:
    """Nobody's adapter or head leaves the one draw that all start from, the held-out one's neither."""
    changes: dict[str, Any] = {} if private else {"privacy": {}}
    federation = {"held_out": ["site-3"], "head": head, "newcomer_head": True}
    job = job_of(tiny_bert, four, federation=federation, **changes)
    out = tmp_path / "out"
    if engine == "local":
        run(job, out)
    else:
        run_on(FakeGrid(4), job, out)
    one = out / "adapters" / "site-0"
    others = [out / kind / name for kind in ("adapters", "adapters_tuned") for name in SITES]
    most = max(moved(one, other) for other in others)
    assert (most < STILL) == private
    rows = json.loads((out / "summary.json").read_text())["clients"]
    assert [rows[name]["metric_base"] is None for name in SITES] == [private] * 4


@pytest.mark.parametrize("private", [True, False])
def test_no_head_of_a_base_line_is_trained(
    private: bool, tiny_bert: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To train one would spend as much as the run did, for one figure."""
    asked = []

    def base_measure(*arguments: Any, **named: Any) -> dict[str, float]:
        asked.append(named["client"])
        return {"accuracy": 0.5, "loss": 1.0}

    monkeypatch.setattr("fedgrove.runs.leave.base_measure", base_measure)
    changes: dict[str, Any] = {} if private else {"privacy": {}}
    run(job_of(tiny_bert, four, **changes), tmp_path / "out")
    assert asked == ([] if private else SITES)


# ------------------------------------------------------------ a newcomer of a finished run
@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("method", ["fedit", "local", "hilora", "fedtreelora"])
def test_a_newcomer_is_trained_under_the_job_s_protection(
    method: str, private: bool, tiny_bert: Path, four: Path, table: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {} if private else {"privacy": {}}
    job = job_of(tiny_bert, four, method={"name": method}, **changes)
    out = tmp_path / "out"
    run(job, out)
    zero, found = adapt(out, table, epochs=0, out=tmp_path / "zero"), adapt(out, table, epochs=3)
    assert (moved(zero.path, found.path) < STILL) == private
    before, after = found.measures.values()
    assert (abs(before["loss"] - after["loss"]) < STILL) == private
    assert (found.privacy is not None) == ("privacy" in card(found.path)) == private


@pytest.mark.parametrize("method", ["fedit", "hilora"])
def test_what_a_newcomer_spends_is_counted_its_probe_included(
    method: str,
    tiny_bert: Path,
    four: Path,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    privacy = {**CLIPPED, "example_clip": 1.0, "example_noise": 1.0}
    out = tmp_path / "out"
    run(job_of(tiny_bert, four, method={"name": method}, privacy=privacy), out)
    found = [adapt(out, table, epochs=e, out=tmp_path / str(e)) for e in (0, 2)]
    probe = 0 if method == "fedit" else found[0].privacy["steps"]  # type: ignore[index]
    assert (probe > 0) == (method == "hilora")
    for adapted, epochs in zip(found, (0, 2), strict=True):
        spent = adapted.privacy
        assert spent is not None
        assert card(adapted.path)["privacy"] == spent
        steps = probe + epochs * -(-adapted.train // 4)
        assert spent["steps"] == steps
        rate = 4 / adapted.train
        assert spent["epsilon"] == accountant.epsilon(1.0, [(rate, steps)], spent["delta"])
    assert main(["adapt", str(out), "--data", str(table), "--epochs", "2"]) == 0
    assert "private steps on its examples cost epsilon = " in capsys.readouterr().out


def test_a_probe_that_nobody_counts_is_not_run(tiny_bert: Path, four: Path) -> None:
    stage = prepare(job_of(tiny_bert, four, method={"name": "fedtreelora"}))
    info, data = stage.clients["site-0"], stage.engine.data["site-0"]
    state = stage.method.begin(list(stage.clients.values()))
    offer = stage.parts.welcome(state, None, info)(None)
    with pytest.raises(RunError, match="is not counted"):
        stage.engine.half.probe(info, data["train"], offer)
