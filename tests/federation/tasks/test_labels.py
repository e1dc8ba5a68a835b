"""Several labels for a text, against dense numbers and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from fedgrove.federation.metrics import asked, measures
from fedgrove.federation.tasks.labels import Labels, LabelsOptions
from fedgrove.ground.errors import DataError

TASK = Labels(("a", "b", "c"))
DATA = LabelsOptions()


def numbers(rows: int) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(rows, 3, generator=draw, dtype=torch.float64)
    truth = (torch.rand(rows, 3, generator=draw) < 0.4).float()
    return logits, [{"input_ids": [1, 2], "label": row} for row in truth.tolist()]


def test_loss_and_f1_are_those_of_a_dense_reference() -> None:
    logits, examples = numbers(20)
    batch = TASK.collate(examples, 0)
    truth = batch["labels"].double()
    likely = 1 / (1 + torch.exp(-logits))
    dense = -(truth * likely.log() + (1 - truth) * (1 - likely).log()).mean()
    assert float(TASK.loss(logits, batch)) == pytest.approx(float(dense), rel=1e-9)
    sums: dict[str, float] = {}
    for part in (slice(0, 7), slice(7, 20)):
        own = {key: value[part] for key, value in batch.items()}
        for key, value in TASK.score(logits[part], own).items():
            sums[key] = sums.get(key, 0.0) + value
    found = TASK.measure(sums)
    answered = (likely >= 0.5).numpy()
    assert found["loss"] == pytest.approx(float(dense), rel=1e-6)
    assert found["f1_micro"] == pytest.approx(f1_score(truth.numpy(), answered, average="micro"))


def test_its_metrics_are_those_of_scikit_learn() -> None:
    logits, examples = numbers(30)
    truth = np.array([each["label"] for each in examples])
    likely = torch.sigmoid(logits).numpy()
    found = measures(asked(TASK), TASK.compared(logits, examples))
    single = f1_score(truth, likely >= 0.5, average=None)
    assert found["f1"] == pytest.approx(dict(zip("abc", single, strict=True)))
    assert found["f1_macro"] == pytest.approx(single.mean())
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, likely, average="macro"))


def test_nothing_due_and_nothing_answered() -> None:
    logits = torch.full((4, 3), -5.0)
    examples = [{"input_ids": [1], "label": [0.0, 0.0, 0.0]}] * 4
    batch = TASK.collate(examples, 0)
    assert TASK.measure(TASK.score(logits, batch))["f1_micro"] == 0.0
    found = measures(asked(TASK), TASK.compared(logits, examples))
    assert found == {"f1_micro": 0.0, "f1_macro": None, "f1": {}, "auroc": None}


@pytest.mark.parametrize(
    ("value", "labels"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ("b; a;", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("[1, 2.0]", ["1", "2"]),
        ([], []),
        ("", []),
    ],
)
def test_how_labels_are_written(value: Any, labels: list[str]) -> None:
    row = TASK.row({"text": "x", "label": value}, DATA, "here")
    assert row == {"text": "x", "labels": labels, "label": " + ".join(labels)}


def test_what_is_refused() -> None:
    for value, words in ((None, "is empty"), (3, "is a int"), ([["a"]], "holds a list")):
        with pytest.raises(DataError, match=f"here: the column 'label' {words}"):
            TASK.row({"text": "x", "label": value}, DATA, "here")
    named = LabelsOptions(labels=("a", "b"))
    with pytest.raises(DataError, match=r"here: the label 'c' is not in data\.labels \('a', 'b'\)"):
        TASK.row({"text": "x", "label": ["c"]}, named, "here")
    with pytest.raises(DataError, match="row 2 has the label 'z', but the model knows only"):
        TASK.target({"labels": ["z"]}, 2)


def test_answers_are_those_above_the_threshold_likeliest_first() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0], [-1.0, -1.0, -1.0]])
    assert TASK.told(logits) == [["b", "a"], []]
    assert Labels(("a", "b", "c"), threshold=0.8).told(logits) == [["b"], []]
    assert TASK.scored(logits)[0]["b"] == pytest.approx(1 / (1 + np.exp(-2.0)))
