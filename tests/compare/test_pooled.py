"""``pooled`` in a comparison: everybody's rows on one machine, measured on each client's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.tiny import tiny_job

import fedgrove as fg
from fedgrove.compare import compare
from fedgrove.engines.pooled import EVERYONE, pooled, steps_of
from fedgrove.federation import build
from fedgrove.ground.errors import JobError, RunError
from fedgrove.job import Job
from fedgrove.start import run


@pytest.fixture(scope="module")
def done(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pooled") / "out"
    mixed = job.replace(federation={"ranks": [2, 4]}, method={"uniform_rank": "min"})
    compare(mixed, methods="fedit, ceiling: pooled", seeds="0", out=out)
    return out


def test_it_is_a_row_like_the_others(done: Path) -> None:
    content = json.loads((done / "compare.json").read_text(encoding="utf-8"))
    assert [row["label"] for row in content["methods"]] == ["local", "fedit", "ceiling"]
    row = content["methods"][-1]
    assert row["bytes"] == {"up": 0, "down": 0}
    assert set(row["values"]["metric"]["0"]) == {"site-0", "site-1", "site-2"}
    for test in content["tests"].values():
        assert test["best"] != "ceiling"
        assert "ceiling" in test["against_best"]


def test_one_trains_and_all_are_measured(done: Path) -> None:
    result = fg.Result(done / "runs" / "ceiling" / "seed-0")
    assert result.summary["method"] == "pooled"
    trained = [line for line in result.metrics() if line["split"] == "train"]
    rows = sum(row["examples"] for row in result.summary["clients"].values())
    assert [(line["client"], line["steps"]) for line in trained] == [(EVERYONE, 3 * 3)] * 2
    assert {line["examples"] for line in trained} == {rows}
    weights = {
        (result.client(name).path / "adapter_model.safetensors").read_bytes()
        for name in result.names()
    }
    assert len(weights) == 1
    for name in result.names():
        found = result.client(name).evaluate()
        assert found["accuracy"] == pytest.approx(result.summary["clients"][name]["metric"])


def test_it_equals_a_run_of_one_silo_with_all_rows(done: Path, job: Job, tmp_path: Path) -> None:
    own = fg.Result(done / "runs" / "ceiling" / "seed-0")
    assert own.job.lora.rank == 4
    assert own.job.federation.ranks == ()
    clients = build(own.job).clients
    rows = [{**row, "part": "train"} for client in clients for row in client.train]
    rows.append({**clients[0].test[0], "part": "test"})
    (tmp_path / "silo").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "silo" / f"{EVERYONE}.jsonl").write_text(lines, encoding="utf-8")
    one = own.job.replace(
        data={"path": str(tmp_path / "silo"), "split": "part"},
        train={"local_steps": 9, "final_local_epochs": 0, "cohort": 1},
    )
    theirs = run(one, tmp_path / "one").client(EVERYONE).path
    ours = own.client("site-1").path
    for file in ("adapter_model.safetensors", "head.safetensors"):
        left, right = load_file(ours / file), load_file(theirs / file)
        assert left.keys() == right.keys()
        assert all(left[name].equal(right[name]) for name in left), file


@pytest.mark.parametrize(
    ("train", "fraction", "steps"),
    [
        ({"local_steps": 5}, 1.0, 50),
        ({"local_steps": 5}, 0.3, 15),
        ({"local_epochs": 2}, 1.0, 2 * 13),  # ceil(103 / 8) batches
        ({"local_epochs": 2}, 0.5, 13),
        ({"local_epochs": 2, "accumulation": 2}, 1.0, 2 * 7),
    ],
)
def test_the_budget_of_a_round(train: dict[str, Any], fraction: float, steps: int) -> None:
    values = {"train": {"batch_size": 8, **train}, "federation": {"fraction": fraction}}
    assert steps_of(Job.build(values), clients=10, rows=103) == steps


def test_what_it_cannot_be_is_refused(
    done: Path, job: Job, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match="which has no options"):
        compare(job, methods="pooled[weights=uniform]", seeds="0", out=tmp_path / "a")
    private = job.replace(privacy={"clip": 1.0, "client_noise": 1.0})
    with pytest.raises(JobError, match=r"\[privacy\] protects nobody"):
        compare(private, methods="fedit,pooled", seeds="0", out=tmp_path / "b")
    with pytest.raises(JobError, match="a row of `fedgrove compare"):
        tiny_job(tiny_bert, silos, method={"name": "pooled"})
    begun = fg.Result(done / "runs" / "ceiling" / "seed-0")
    longer = begun.job.replace(run={"rounds": 3})
    with pytest.raises(RunError, match="with all rows on one machine"):
        run(longer, begun.path, resume=True)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_a_frozen_head_stays_frozen_and_a_writer_has_none(job: Job) -> None:
    assert pooled(job).federation.head == "shared"
    frozen = job.replace(federation={"head": "frozen"})
    assert pooled(frozen).federation.head == "frozen"
    attacked = job.replace(attack={"kind": "sign-flip"}, defence={"rule": "median", "norm": 0.5})
    assert not pooled(attacked).attack.active
    assert not pooled(attacked).defence.active
    writer = Job.build({"data": {"task": "generate"}})
    assert pooled(writer).federation.head == "local"
