"""Every choice that a job leaves open is made before the first round, on every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_job

from fedgrove.compare.plan import check, make_plan
from fedgrove.engines.flower.deployable import deployable
from fedgrove.engines.local import prepare
from fedgrove.ground.errors import JobError
from fedgrove.ground.marks import automatic_keys, default_of
from fedgrove.job import Job
from fedgrove.runs.prepare import machine_choices, settle

OPEN = dict.fromkeys(["device", "dtype", "threads", "eval_batch_size", "cohort"], "auto")


def still_open(job: Job) -> set[str]:
    """The automatic keys at their default, but what describes an adapter where there is none."""
    found = set()
    for section, key in automatic_keys(job):
        if getattr(getattr(job, section), key) == default_of(job, (section, key)):
            found.add(f"{section}.{key}")
    if job.model.adapter is None:
        found.discard("model.adapter_digest")
    return found


@pytest.fixture
def open_job(tiny_bert: Path, silos: Path) -> Job:
    job: Job = tiny_job(tiny_bert, silos, train=OPEN)
    assert len(still_open(job)) == len(automatic_keys(job)) - 1  # it has no adapter
    return job


def test_nothing_automatic_is_open_once_a_run_is_prepared(open_job: Job) -> None:
    stage = prepare(open_job)
    assert still_open(stage.job) == set()
    assert stage.job.data.labels == ("negative", "positive")
    assert stage.job.federation.newcomer_head is False


def test_machine_and_data_decide_all_but_the_cohort(open_job: Job) -> None:
    """Which the engine decides: beside each other only clients of one process can train."""
    job, people = settle(open_job)
    assert still_open(job) == {"train.cohort"}
    assert list(people.everyone) == ["site-0", "site-1", "site-2"]


def test_between_organisations_all_that_is_open_is_decided_without_data(open_job: Job) -> None:
    named = open_job.replace(data={"labels": ["negative", "positive"]})
    assert still_open(deployable(machine_choices(named))) == set()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"federation": {"min_clients": 9}}, r"federation\.min_clients = 9"),
        ({"privacy": {"clip": 1.0}}, r"^local: privacy\.clip has no use"),
        ({"privacy": {"example_clip": 1.0}, "run": {"noise": True}}, r"run\.noise"),
    ],
)
def test_a_comparison_asks_all_that_a_run_asks_before_it_starts(
    changes: dict[str, Any], words: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    plan = make_plan(
        tiny_job(tiny_bert, silos, **changes), "local, hilora", [0], out=tmp_path / "out"
    )
    with pytest.raises(JobError, match=words):
        check(plan)
    assert not (tmp_path / "out").exists()
