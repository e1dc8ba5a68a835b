"""Classes that count more, and classes that are steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from tests.tiny import tiny_job
from torch import Tensor
from transformers import AutoTokenizer

import fedgrove as fg
from fedgrove.federation import build
from fedgrove.federation.metrics import Answers, measures
from fedgrove.federation.tasks import ClassifyText
from fedgrove.ground.errors import DataError, JobError
from fedgrove.job import Job

MakeJob = Callable[..., Job]
WriteRows = Callable[[Path, list[dict[str, Any]]], Path]
LABELS = ("low", "middle", "high")
COUNTED = ["low"] * 6 + ["high"] * 2 + ["middle"]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(tiny_bert))


def batch_of(task: ClassifyText, tokenizer: Any, labels: list[str]) -> dict[str, Tensor]:
    rows = [{"text": "good day", "label": label} for label in labels]
    return task.collate(task.encode(rows, tokenizer), 0)


def logits(count: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_balanced_weights_are_those_of_scikit_learn(tokenizer: Any) -> None:
    task = ClassifyText(LABELS, class_weights="balanced")
    batch = batch_of(task, tokenizer, COUNTED)
    numbers = np.array([LABELS.index(label) for label in COUNTED])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=numbers)
    assert batch["weights"].tolist() == pytest.approx(expected[numbers].tolist())
    assert float(batch["weights"].mean()) == pytest.approx(1.0)
    given = logits(len(COUNTED))
    chances = torch.softmax(given, -1)[torch.arange(len(COUNTED)), torch.tensor(numbers)]
    dense = (-torch.log(chances) * torch.tensor(expected[numbers])).mean()
    assert float(task.loss(given, batch)) == pytest.approx(float(dense), rel=1e-6)
    # one example at a time, as under example-level privacy, each keeps its weight
    alone = [
        task.loss(given[i : i + 1], {key: value[i : i + 1] for key, value in batch.items()})
        for i in range(len(COUNTED))
    ]
    assert float(torch.stack(alone).mean()) == pytest.approx(float(dense), rel=1e-6)


def test_classes_that_a_client_lacks_do_not_count(tokenizer: Any) -> None:
    task = ClassifyText(LABELS, class_weights="balanced")
    batch = batch_of(task, tokenizer, ["low", "low", "low", "high"])
    assert batch["weights"].tolist() == pytest.approx([2 / 3] * 3 + [2.0])


@pytest.mark.parametrize("weights", ["balanced", {"high": 5.0}])
def test_a_split_without_rows_has_no_weights(weights: Any, tokenizer: Any) -> None:
    """As a validation that was not asked for."""
    assert ClassifyText(LABELS, class_weights=weights).encode([], tokenizer) == []


def test_weights_by_name(tokenizer: Any) -> None:
    task = ClassifyText(LABELS, class_weights={"high": 5.0})
    batch = batch_of(task, tokenizer, ["low", "high"])
    assert batch["weights"].tolist() == [1.0, 5.0]
    assert set(task.inputs(batch)) == {"input_ids", "attention_mask"}
    with pytest.raises(DataError, match=r"class_weights has 'hihg', which is no class; .* 'low'"):
        batch_of(ClassifyText(LABELS, class_weights={"hihg": 5.0}), tokenizer, ["low"])


def test_measures_are_not_weighted(tokenizer: Any) -> None:
    plain, weighted = ClassifyText(LABELS), ClassifyText(LABELS, class_weights="balanced")
    given = logits(len(COUNTED))
    one = plain.score(given, batch_of(plain, tokenizer, COUNTED))
    assert weighted.score(given, batch_of(weighted, tokenizer, COUNTED)) == one


def test_of_steps_an_answer_costs_the_less_the_nearer_it_is(tokenizer: Any) -> None:
    task = ClassifyText(LABELS, ordinal=True)
    batch = batch_of(task, tokenizer, ["low"])
    sure = 6 * torch.eye(3, dtype=torch.float64)
    right, near, far = (float(task.loss(sure[i : i + 1], batch)) for i in range(3))
    assert right < near < far
    soft = np.exp([-0.0, -1.0, -4.0])
    soft /= soft.sum()
    given = logits(1)
    dense = -(torch.tensor(soft) * torch.log_softmax(given, -1)).sum()
    assert float(task.loss(given, batch)) == pytest.approx(float(dense), rel=1e-9)


def test_steps_are_measured_by_their_distance() -> None:
    task = ClassifyText(LABELS, ordinal=True)
    assert task.wanted()[-2:] == ("qwk", "steps_off")
    truth, said = np.array([0, 1, 2, 2, 0]), np.array([0, 2, 2, 0, 1])
    found = measures(["qwk", "steps_off"], Answers(labels=LABELS, truth=truth, predicted=said))
    assert found["steps_off"] == pytest.approx(4 / 5)
    seen = np.zeros((3, 3))
    np.add.at(seen, (truth, said), 1)
    chance = np.outer(seen.sum(1), seen.sum(0)) / seen.sum()
    cost = (np.arange(3)[:, None] - np.arange(3)) ** 2
    assert found["qwk"] == pytest.approx(1 - (cost * seen).sum() / (cost * chance).sum())


def test_the_order_of_steps_must_be_known(
    make_job: MakeJob, write_rows: WriteRows, tmp_path: Path
) -> None:
    for name, labels in (("words", LABELS), ("numbers", ("1", "2", "10"))):
        rows = [{"text": f"w{i}", "label": labels[i % 3]} for i in range(12)]
        write_rows(tmp_path / name / "a.jsonl", rows)
    settings = ["data.source=silos", "data.ordinal=true"]
    job = make_job(*settings, f"data.path='{tmp_path / 'words'}'")
    with pytest.raises(
        DataError, match=r"data\.ordinal = true, but the labels 'high', 'low', 'mid"
    ):
        build(job)
    listed = job.override(['data.labels=["low", "middle", "high"]'])
    assert build(listed).labels == LABELS
    numbers = job.override([f"data.path='{tmp_path / 'numbers'}'"])
    assert build(numbers).labels == ("1", "2", "10")


def test_keys(make_job: MakeJob) -> None:
    assert make_job("data.class_weights={a=2.0}").data.class_weights == {"a": 2.0}
    with pytest.raises(JobError, match=r'class_weights must be "none", "balanced" or a table'):
        make_job("data.class_weights=even")
    for task in (
        ClassifyText(LABELS),
        ClassifyText(LABELS, class_weights={"low": 2.0}, ordinal=True),
    ):
        assert ClassifyText.from_card(task.card()) == task
    assert set(ClassifyText(LABELS).card()) == {"task", "labels", "max_length"}


@pytest.mark.parametrize("more", [{}, {"privacy": {"example_clip": 100.0, "randomness": "seed"}}])
def test_a_run_with_weights(
    more: dict[str, Any], tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """Together or alone, with clipped examples or without, weights change what is learnt."""
    found: dict[str, dict[str, float]] = {}
    for name, data, train in (
        ("plain", {}, {"cohort": 1}),
        ("alone", {"class_weights": {"positive": 9.0}}, {"cohort": 1}),
        ("together", {"class_weights": {"positive": 9.0}}, {"cohort": 3}),
    ):
        job = tiny_job(tiny_bert, silos, data=data, train=train, run={"rounds": 2}, **more)
        result = fg.run(job, tmp_path / name)
        found[name] = {
            client: result.summary["clients"][client]["loss"] for client in result.names()
        }
        card = (result.client("site-0").path / "fedgrove.json").read_text()
        assert ("class_weights" in card) == bool(data)
    assert found["alone"] != pytest.approx(found["plain"], rel=1e-3)
    assert found["alone"] == pytest.approx(found["together"], rel=1e-4)
