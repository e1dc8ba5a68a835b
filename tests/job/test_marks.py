"""Marks on the job's fields: every key under every change of source, task, partition and method."""

from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import pytest

from fedgrove.ground.errors import JobError
from fedgrove.ground.marks import (
    Automatic,
    Of,
    automatic_keys,
    choosers,
    default_of,
    marked,
    sections,
)
from fedgrove.job import DataSection, Job, PartitionSection

pytestmark = pytest.mark.usefixtures("few_methods")

#: what a job of each source needs at least
NEEDED: dict[str, dict[str, Any]] = {
    "embedded": {},
    "silos": {"path": "mine"},
    "table": {"path": "mine.csv"},
    "hub": {"name": "ag_news"},
    "made": {},
}
#: a value of each key of [data] that is not its default, with what else it needs
OTHER: dict[str, dict[str, Any]] = {
    "task": {"task": "generate"},
    "name": {"name": "nlu-tasks"},
    "config": {"config": "plain"},
    "path": {"path": "elsewhere"},
    "parts": {"parts": [{"name": "mnli", "dataset": "nyu-mll/glue"}]},
    "encoding": {"encoding": "cp1252"},
    "split": {"split": "part"},
    "metrics": {"metrics": ["mcc"]},
    "text": {"text": "note"},
    "pair": {"pair": "claim"},
    "image": {"task": "classify-images", "image": "scan"},
    "label": {"label": "code"},
    "prompt": {"task": "generate", "prompt": "question"},
    "completion": {"task": "generate", "completion": "answer"},
    "messages": {"task": "generate", "messages": "chat"},
    "made": {"made": "other"},
    "separator": {"task": "labels", "separator": ","},
    "threshold": {"task": "labels", "threshold": 0.3},
    "targets": {"task": "regression", "targets": ["heat"]},
    "center": {"task": "regression", "center": [1.0]},
    "scale": {"task": "regression", "scale": [2.0]},
    "spans": {"task": "tokens", "spans": "entities"},
    "words": {"task": "tokens", "words": "tokens", "tags": "ner_tags"},
    "tags": {"task": "tokens", "words": "tokens", "tags": "ner_tags"},
    "tag_names": {"task": "tokens", "tag_names": ["O", "B-PER"]},
    "group": {"group": "site"},
    "groups": {"group": "site", "groups": ["a*"]},
    "labels": {"labels": ["no", "yes"]},
    "class_weights": {"class_weights": "balanced"},
    "ordinal": {"ordinal": True},
    "max_length": {"max_length": 64},
    "answers": {"task": "generate", "messages": "chat", "answers": "every"},
    "template": {"task": "generate", "template": "{question}"},
    "plain": {"task": "generate", "plain": "note"},
    "question": {"task": "spans", "question": "asked"},
    "context": {"task": "spans", "context": "note"},
    "stride": {"task": "spans", "stride": 8},
    "unanswerable": {"task": "spans", "unanswerable": True},
    "chosen": {"task": "prefer", "chosen": "better"},
    "rejected": {"task": "prefer", "rejected": "worse"},
    "whole": {"task": "prefer", "whole": True},
    "ratings": {"task": "reward", "ratings": ["up", "down"]},
    "beta": {"task": "prefer", "beta": 0.3},
    "label_smoothing": {"task": "prefer", "label_smoothing": 0.1},
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
    "embedded": {"made", "path", "encoding", "config", "parts"},
    "silos": {"made", "name", "config", "parts", "groups", "partition"},
    "table": {"made", "name", "config", "parts"},
    "hub": {"made", "path", "encoding"},
    "made": {"name", "path", "encoding", "config", "parts"},
}
#: what describes the budget or the split, and not one data set
STAYS = {
    "task",
    "metrics",
    "max_length",
    "max_new_tokens",
    "generate_examples",
    "threshold",
    "beta",
    "label_smoothing",
    "stride",
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


def at(job: Job, key: str) -> Any:
    """What a job says; what it has no key for is the key's default."""
    default = DataSection.offered()[key].get_default(call_default_factory=True)
    return getattr(job.data, key, default)


def default_at(key: str, source: str) -> Any:
    data = DataSection(source=source, **NEEDED[source])
    field = type(data).model_fields.get(key, DataSection.offered()[key])
    return field.get_default(call_default_factory=True)


def test_the_table_of_this_test_has_every_key() -> None:
    assert {"source", *OTHER} == set(DataSection.offered())


@pytest.mark.parametrize(("key", "before", "after"), CASES)
def test_every_key_under_another_source(key: str, before: str, after: str) -> None:
    """The job that comes out is one: what the old source had is gone, the rest stays."""
    job = Job.build({"data": {"source": before, **NEEDED[before], **OTHER[key]}})
    settings = [f"data.{name}={value}" for name, value in NEEDED[after].items()]
    changed = job.override([f"data.source={after}", *settings])
    found, default = at(changed, key), default_at(key, after)
    if key in NEEDED[after]:
        assert found == NEEDED[after][key]
        return
    own_files = {before, after} == {"silos", "table"} and key not in FOREIGN[after]
    stays = key in STAYS and (after != "embedded" or "task" not in OTHER[key])
    if stays or own_files:
        assert found == at(job, key) != default
    else:
        assert found == default


def test_the_embedded_default_can_be_had_from_any_job() -> None:
    """A job on pairs of the hub kept ``pair``, and one with parts failed on them."""
    pairs = Job.build({"data": {"source": "hub", "name": "snli", "pair": "hypothesis"}})
    parts = Job.build({"data": {"source": "hub", **OTHER["parts"]}})
    for job in (pairs, parts):
        assert job.override(["data.source=embedded"]).data == DataSection()


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("after", ["classify-text", "classify-images", "generate", "tokens"])
def test_every_key_under_another_task(key: str, after: str) -> None:
    source = "hub"
    if key in ("path", "encoding"):
        source = "silos"
    if key == "made":
        source = "made"
    values: dict[str, Any] = {"task": "classify-text", **NEEDED[source], **OTHER[key]}
    if key == "parts" and after != "classify-text":
        return  # they are texts with labels
    job = Job.build({"data": {"source": source, **values}})
    changed = job.override([f"data.task={after}"])
    if key == "task":
        return
    if (key, after) == ("labels", "tokens"):  # types of entities are no classes of rows
        assert changed.data.labels is None
        return
    if key in type(changed.data).model_fields and (key != "metrics" or after == "classify-text"):
        assert at(changed, key) == at(job, key)
    else:
        assert changed.to_dict()["data"].get(key, []) == []


def test_a_key_of_another_task_is_refused_and_not_forgotten() -> None:
    with pytest.raises(JobError, match="max_new_tokens = 9 has no use with"):
        Job.build({"data": {"max_new_tokens": 9}})


def test_keys_of_other_parts_that_say_nothing_are_passed_over() -> None:
    """As the files of earlier versions have them, which wrote every key out."""
    defaults = {
        key: field.get_default(call_default_factory=True)
        for key, field in DataSection.offered().items()
        if key in ("prompt", "completion", "image", "max_new_tokens", "text", "answers")
    }
    job = Job.build({"data": {"source": "silos", "path": "mine", "parts": [], **defaults}})
    assert job == Job.build({"data": {"source": "silos", "path": "mine"}})


def test_a_job_can_be_copied() -> None:
    job = Job.build({"data": {"source": "hub", **OTHER["parts"]}})
    assert copy.deepcopy(job) == job
    by_hand: Any = DataSection
    assert by_hand(source="silos", path="mine").path == "mine"


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
    job = Job()
    found = dict(sections(job))
    for path, mark in marked(job, Of):
        assert (*path[:-1], mark.chooser) in choosers(job)
        assert mark.chooser in found[path[:-1]].model_fields


def test_what_is_automatic_is_open_by_default() -> None:
    assert set(automatic_keys(Job())) == {
        ("model", "adapter_digest"),
        ("data", "task"),
        ("data", "labels"),
        ("federation", "newcomer_head"),
        ("train", "device"),
        ("train", "dtype"),
        ("train", "threads"),
        ("train", "eval_batch_size"),
        ("train", "cohort"),
    }
    for path, _ in marked(Job(), Automatic):
        assert default_of(Job(), path) in ("auto", None)


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
