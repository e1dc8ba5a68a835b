"""Numbers for a text: scaling, measures, and a head that leaves in true units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import r2_score, root_mean_squared_error

from fedgrove.federation.metrics import Answers, asked, measures
from fedgrove.federation.tasks.regression import Regression, RegressionOptions
from fedgrove.ground.errors import DataError

TASK = Regression(("heat", "days"), center=(37.0, 4.0), scale=(0.5, 3.0))
DATA = RegressionOptions(targets=("heat", "days"))


def rows(count: int) -> tuple[np.ndarray[Any, Any], torch.Tensor, list[dict[str, Any]]]:
    draw = np.random.default_rng(2)
    truth = draw.normal([37.0, 5.0], [1.0, 3.0], (count, 2))
    logits = torch.from_numpy((truth - [37.0, 4.0]) / [0.5, 3.0] + draw.normal(0, 0.4, (count, 2)))
    labels = [TASK.target({"targets": row}, 1) for row in truth.tolist()]
    return truth, logits, [{"input_ids": [1], "label": label} for label in labels]


def test_measures_are_those_of_scikit_learn_in_true_units() -> None:
    truth, logits, examples = rows(25)
    said = logits.numpy() * [0.5, 3.0] + [37.0, 4.0]
    batch = TASK.collate(examples, 0)
    found = TASK.measure(TASK.score(logits, batch))
    assert found["r2"] == pytest.approx(r2_score(truth, said), rel=1e-5)
    missed = ((said - truth) / [0.5, 3.0]) ** 2
    assert found["loss"] == pytest.approx(missed.mean(), rel=1e-5)
    assert float(TASK.loss(logits, batch)) == pytest.approx(missed.mean(), rel=1e-5)
    full = measures(asked(TASK), TASK.compared(logits, examples))
    for number, name in enumerate(("heat", "days")):
        pair = truth[:, number], said[:, number]
        assert full["rmse"][name] == pytest.approx(root_mean_squared_error(*pair))
        assert full["pearson"][name] == pytest.approx(pearsonr(*pair).statistic)
        assert full["spearman"][name] == pytest.approx(spearmanr(*pair).statistic)


def test_one_number_has_no_names_and_a_constant_no_correlation() -> None:
    truth = np.array([[1.0], [2.0], [4.0]])
    found = measures(["rmse", "pearson"], Answers(truth=truth, predicted=truth + 3))
    assert found == {"rmse": 3.0, "pearson": pytest.approx(1.0)}
    flat = measures(["pearson", "spearman"], Answers(truth=truth, predicted=truth * 0))
    assert flat == {"pearson": None, "spearman": None}


@pytest.mark.parametrize("names", [("weight", "bias"), ("out.weight", "out.bias")])
def test_what_leaves_gives_true_units_and_the_same_loss(names: tuple[str, str]) -> None:
    _, _, examples = rows(6)
    states = torch.randn(6, 8, dtype=torch.float64)
    weight, bias = names
    head = {
        "dense.weight": torch.randn(8, 8, dtype=torch.float64),
        weight: torch.randn(2, 8, dtype=torch.float64),
        bias: torch.randn(2, dtype=torch.float64),
    }
    left, folded = TASK.leaving(head)
    before = states @ head[weight].T + head[bias]
    after = states @ folded[weight].T + folded[bias]
    batch = TASK.collate(examples, 0)
    assert torch.equal(folded["dense.weight"], head["dense.weight"])
    assert float(left.loss(after, batch)) == pytest.approx(float(TASK.loss(before, batch)))
    scaled = before[:, 1] * 3.0 + 4.0
    assert after[:, 1].tolist() == pytest.approx(scaled.tolist())
    assert left.told(after)[0] == pytest.approx(TASK.told(before)[0])
    assert Regression.from_card(left.card()) == left


def test_center_and_scale_of_training_rows() -> None:
    given = [{"targets": [1.0, 5.0]}, {"targets": [3.0, 9.0]}]
    assert TASK.settled(DATA, given) == {"center": [2.0, 7.0], "scale": [1.0, 2.0]}
    named = RegressionOptions(targets=("heat", "days"), center=(0.0, 0.0))
    assert TASK.settled(named, given)["scale"] == pytest.approx([5**0.5, 53**0.5])
    with pytest.raises(DataError, match="column 'heat' is the same number in all training rows"):
        TASK.settled(DATA, [{"targets": [1.0, 5.0]}, {"targets": [1.0, 9.0]}])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", "", None, True, "many", [1]])
def test_what_is_no_finite_number_is_refused_by_row(value: Any) -> None:
    with pytest.raises(DataError, match=r"here: the column 'days' is .*, not a finite number"):
        TASK.row({"text": "x", "heat": 1, "days": value}, DATA, "here")


def test_numbers_as_texts_and_too_few_of_them() -> None:
    row = TASK.row({"text": "x", "heat": "37.5", "days": 2}, DATA, "here")
    assert row == {"text": "x", "targets": [37.5, 2.0], "label": ""}
    with pytest.raises(DataError, match="row 3 has 1 targets, but the model knows 2: heat, days"):
        TASK.target({"targets": 1.0}, 3)
    with pytest.raises(ValueError, match=r"data.center = \[1.0\] has 1 numbers, but there are 2"):
        RegressionOptions(targets=("heat", "days"), center=(1.0,))
