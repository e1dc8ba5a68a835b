"""Metrics of classes, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedgrove.federation.metrics import METRICS, Answers, asked, measures
from fedgrove.federation.metrics.classes import BINS
from fedgrove.federation.tasks import ClassifyText, Generate

NAMES = ["f1_macro", "f1", "mcc", "balanced_accuracy", "auroc", "ece"]


def answers(truth: list[int], scores: np.ndarray, labels: str = "abc") -> Answers:
    return Answers(
        labels=tuple(labels),
        truth=np.array(truth),
        predicted=scores.argmax(1),
        scores=scores,
    )


def dense(given: Answers) -> dict[str, float]:
    """The same figures by counting, in float64."""
    assert given.truth is not None
    assert given.predicted is not None
    assert given.scores is not None
    truth, said, scores = given.truth, given.predicted, given.scores
    classes = sorted(set(truth.tolist()) | set(said.tolist()))
    f1, recall = [], []
    for each in classes:
        hit = int(((truth == each) & (said == each)).sum())
        wrong, missed = int((said == each).sum()) - hit, int((truth == each).sum()) - hit
        f1.append(2 * hit / (2 * hit + wrong + missed))
        if hit + missed:
            recall.append(hit / (hit + missed))
    areas = []
    for each in sorted(set(truth.tolist())):
        own, rest = scores[truth == each, each], scores[truth != each, each]
        wins = (own[:, None] > rest).mean() + (own[:, None] == rest).mean() / 2
        areas.append(wins)
    one_hot = lambda values: np.eye(len(given.labels))[values]  # noqa: E731
    x, y = one_hot(truth), one_hot(said)
    covariance = lambda p, q: ((p - p.mean(0)) * (q - q.mean(0))).sum()  # noqa: E731
    spread = math.sqrt(covariance(x, x) * covariance(y, y))
    sure = scores.max(1)
    gap = 0.0
    for index in range(BINS):
        low, high = index / BINS, (index + 1) / BINS
        inside = (sure > low) & (sure <= high)
        if inside.any():
            gap += inside.mean() * abs((truth == said)[inside].mean() - sure[inside].mean())
    return {
        "f1_macro": float(np.mean(f1)),
        "balanced_accuracy": float(np.mean(recall)),
        "auroc": float(np.mean(areas)),
        "mcc": covariance(x, y) / spread if spread else 0.0,
        "ece": gap,
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("classes", [2, 3])
def test_every_figure_is_its_definition(seed: int, classes: int) -> None:
    draw = np.random.default_rng(seed)
    scores = draw.dirichlet([0.6] * classes, size=40)
    truth = [int(draw.choice(classes, p=row)) for row in scores]
    given = answers(truth, scores, "abc"[:classes])
    found = measures(NAMES, given)
    for name, value in dense(given).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert np.mean(list(found["f1"].values())) == pytest.approx(found["f1_macro"])


def test_a_known_case_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    found = measures(NAMES, answers([0, 1, 1, 0], scores, "ab"))
    assert found["f1"] == pytest.approx({"a": 0.8, "b": 2 / 3})
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["auroc"] == pytest.approx(1.0)
    assert found["mcc"] == pytest.approx(1 / math.sqrt(3))
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)


def test_rows_of_one_class_have_no_auroc() -> None:
    scores = np.array([[0.9, 0.1], [0.6, 0.4]])
    found = measures(NAMES, answers([0, 0], scores, "ab"))
    assert found["auroc"] is None
    assert found["f1"] == {"a": 1.0}
    assert (found["mcc"], found["balanced_accuracy"]) == (0.0, 1.0)


def test_a_class_that_does_not_occur_is_left_out() -> None:
    scores = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1]])
    found = measures(NAMES, answers([0, 1, 0], scores))
    assert set(found["f1"]) == {"a", "b"}
    assert found["auroc"] == pytest.approx(1.0)


def test_a_task_has_metrics_and_a_job_may_ask_for_more() -> None:
    assert asked(ClassifyText(("a", "b"))) == NAMES
    assert asked(ClassifyText(("a", "b")), ["ece", "mine"]) == [*NAMES, "mine"]
    assert asked(Generate(), ["rouge_1"]) == ["rouge_1"]
    assert not METRICS.find("ece").higher
    assert METRICS.find("mcc").higher


def test_texts_are_compared_with_their_references() -> None:
    given = Answers(
        outputs=["it was bad", "fine"], references=[["It was bad."], ["good", "fine day"]]
    )
    found = measures(["exact_match", "rouge_1", "rouge_l"], given)
    assert found["exact_match"] == 0.5
    assert found["rouge_1"] == pytest.approx((1 + 2 / 3) / 2)


def test_a_diverged_model_has_no_figures_of_scores() -> None:
    scores = np.full((4, 3), math.nan)
    found = measures(["auroc", "ece", "f1"], answers([0, 1, 2, 0], scores))
    assert found["auroc"] is None
    assert found["ece"] is None
    assert found["f1"] is not None
