"""Marks on the job's fields: every key under every change of source, task, partition and method."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from fedgrove.ground.errors import JobError
from fedgrove.job import DataSection, Job, PartitionSection
from fedgrove.job.marks import (
    Automatic,
    Of,
    Only,
    automatic_keys,
    choosers,
    default_of,
    marked,
    marks_of,
    sections,
)

pytestmark = pytest.mark.usefixtures("few_methods")

#: what a job of each source needs at least
NEEDED: dict[str, dict[str, Any]] = {
    "embedded": {},
    "silos": {"path": "mine"},
    "table": {"path": "mine.csv"},
    "hub": {"name": "ag_news"},
}
#: a value of each key of [data] that is not its default, with what else it needs
OTHER: dict[str, dict[str, Any]] = {
    "task": {"task": "generate"},
    "name": {"name": "nlu-tasks"},
    "config": {"config": "plain"},
    "path": {"path": "elsewhere"},
    "parts": {"parts": [{"name": "mnli", "dataset": "nyu-mll/glue"}]},
    "text": {"text": "note"},
    "pair": {"pair": "claim"},
    "image": {"task": "classify-images", "image": "scan"},
    "label": {"label": "code"},
    "prompt": {"task": "generate", "prompt": "question"},
    "completion": {"task": "generate", "completion": "answer"},
    "messages": {"task": "generate", "messages": "chat"},
    "group": {"group": "site"},
    "groups": {"group": "site", "groups": ["a*"]},
    "labels": {"labels": ["no", "yes"]},
    "max_length": {"max_length": 64},
    "max_new_tokens": {"task": "generate", "max_new_tokens": 9},
    "generate_examples": {"task": "generate", "generate_examples": 3},
    "test_fraction": {"test_fraction": 0.1},
    "validation_fraction": {"validation_fraction": 0.1},
    "train_examples": {"train_examples": 7},
    "test_examples": {"test_examples": 7},
    "partition": {"partition": {"by": "iid"}},
}
#: which keys a source does not have
FOREIGN = {
    "embedded": {"path", "config", "parts"},
    "silos": {"name", "config", "parts", "groups", "partition"},
    "table": {"name", "config", "parts"},
    "hub": {"path"},
}
#: what describes the budget or the split, and not one data set
STAYS = {
    "task",
    "max_length",
    "max_new_tokens",
    "generate_examples",
    "test_fraction",
    "validation_fraction",
}
CASES = [
    (key, before, after)
    for key in OTHER
    for before, after in permutations(NEEDED, 2)
    if key not in FOREIGN[before]
]


def data_of(job: Job) -> dict[str, Any]:
    return job.to_dict()["data"]


def test_the_table_of_this_test_has_every_key() -> None:
    assert {"source", *OTHER} == set(DataSection.model_fields)


@pytest.mark.parametrize(("key", "before", "after"), CASES)
def test_every_key_under_another_source(key: str, before: str, after: str) -> None:
    """The job that comes out is one: what the old source had is gone, the rest stays."""
    job = Job.build({"data": {"source": before, **NEEDED[before], **OTHER[key]}})
    settings = [f"data.{name}={value}" for name, value in NEEDED[after].items()]
    changed = job.override([f"data.source={after}", *settings])
    found, default = getattr(changed.data, key), default_of(Job, ("data", key))
    if key in NEEDED[after]:
        assert found == NEEDED[after][key]
        return
    own_files = {before, after} == {"silos", "table"} and key not in FOREIGN[after]
    stays = key in STAYS and (after != "embedded" or "task" not in OTHER[key])
    if stays or own_files:
        assert found == getattr(job.data, key) != default
    else:
        assert found == default


def test_the_embedded_default_can_be_had_from_any_job() -> None:
    """A job on pairs of the hub kept ``pair``, and one with parts failed on them."""
    pairs = Job.build({"data": {"source": "hub", "name": "snli", "pair": "hypothesis"}})
    parts = Job.build({"data": {"source": "hub", **OTHER["parts"]}})
    for job in (pairs, parts):
        assert job.override(["data.source=embedded"]).data == DataSection()


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("after", ["classify-text", "classify-images", "generate"])
def test_every_key_under_another_task(key: str, after: str) -> None:
    source = "silos" if key == "path" else "hub"
    values: dict[str, Any] = {"task": "classify-text", **NEEDED[source], **OTHER[key]}
    if key == "groups":
        values["source"] = "hub"
    job = Job.build({"data": {"source": source, **values}})
    changed = job.override([f"data.task={after}"])
    if key == "task":
        return
    only = marks_of(DataSection.model_fields[key], Only)
    stays = all(after in mark.values for mark in only if mark.chooser == "task")
    expected = getattr(job.data, key) if stays else default_of(Job, ("data", key))
    assert getattr(changed.data, key) == expected


def test_a_task_that_was_open_is_decided_and_drops_nothing() -> None:
    """So that a key of another task is refused, and not forgotten in silence."""
    job = Job.build({"data": {"max_new_tokens": 9}})
    with pytest.raises(JobError, match="max_new_tokens has no use with"):
        job.replace(data={"task": "classify-text"})


@pytest.mark.parametrize("key", PartitionSection.model_fields)
def test_another_partition_has_its_own_options(key: str) -> None:
    job = Job.default().override(["data.partition.by=iid"])
    assert job.data.partition.by == "iid"
    assert job.data.partition.options == {}
    kept = Job.default().override(["data.partition.by=dirichlet"])
    assert getattr(kept.data.partition, key) == getattr(Job.default().data.partition, key)


def test_another_method_has_its_own_keys() -> None:
    job = Job.build({"method": {"name": "fedtreelora", "K": 5, "uniform_rank": "min"}})
    changed = job.override(["method.name=fedit"])
    assert changed.to_dict()["method"] == {
        "name": "fedit",
        "uniform_rank": "min",
        "weights": "examples",
    }
    for section in ("data", "train", "federation", "run"):
        assert changed.to_dict()[section] == job.to_dict()[section]


def test_every_mark_names_a_key_of_its_section() -> None:
    found = dict(sections(Job))
    of = [(path, mark.chooser) for path, mark in marked(Job, Of)]
    only = [(path, mark.chooser) for path, mark in marked(Job, Only)]
    for path, chooser in [*of, *only]:
        assert (*path[:-1], chooser) in choosers(Job)
        assert chooser in found[path[:-1]].model_fields


def test_what_is_automatic_is_open_by_default() -> None:
    assert set(automatic_keys(Job)) == {
        ("data", "task"),
        ("data", "labels"),
        ("federation", "newcomer_head"),
        ("train", "device"),
        ("train", "dtype"),
        ("train", "threads"),
        ("train", "eval_batch_size"),
        ("train", "cohort"),
    }
    for path, _ in marked(Job, Automatic):
        assert default_of(Job, path) in ("auto", None)


def test_what_was_decided_can_be_opened_and_adopted() -> None:
    decided = Job.build(
        {
            "data": {"task": "classify-text", "labels": ["no", "yes"]},
            "federation": {"newcomer_head": True},
            "train": {
                "device": "cpu",
                "dtype": "bfloat16",
                "threads": 3,
                "eval_batch_size": 5,
                "cohort": 2,
            },
        }
    )
    assert Job().adopting(decided) == decided
    mine = Job.build({"train": {"threads": 7}})
    assert mine.adopting(decided).train.threads == 7, "what the job says itself stays"
    opened = decided.opened("machine")
    assert opened.train == Job().train
    assert opened.data == decided.data
