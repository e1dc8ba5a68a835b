"""How well classes are told apart, beside accuracy: by scikit-learn, and a calibration error."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedgrove.federation.metrics.base import Answers, Metric

BINS = 15  # of equal width, as in Guo et al., "On Calibration of Modern Neural Networks" (2017)


ONE, SEVERAL = "class", "labels"  # kinds of answers: a class for each row, or any number of them


class F1Micro(Metric):
    """F1 over all labels of all rows together."""

    name: ClassVar[str] = "f1_micro"
    of: ClassVar[tuple[str, ...]] = (ONE, SEVERAL)

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]; 0 where no label occurs and none was answered."""
        from sklearn.metrics import f1_score

        return float(
            f1_score(
                answers.truth,
                answers.predicted,
                average="micro",
                zero_division=0,
            )
        )


class F1Macro(Metric):
    """The mean of the classes' F1, over classes that occur or were answered."""

    name: ClassVar[str] = "f1_macro"
    of: ClassVar[tuple[str, ...]] = (ONE, SEVERAL)

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]; nan where no class occurs and none was answered."""
        from sklearn.metrics import f1_score

        present = _present(answers)
        if not present:
            return math.nan
        return float(
            f1_score(
                answers.truth,
                answers.predicted,
                labels=present,
                average="macro",
                zero_division=0,
            )
        )


class F1(Metric):
    """F1 of each class that occurs or was answered."""

    name: ClassVar[str] = "f1"
    of: ClassVar[tuple[str, ...]] = (ONE, SEVERAL)

    def __call__(self, answers: Answers) -> dict[str, float]:
        """By the label's name."""
        from sklearn.metrics import f1_score

        present = _present(answers)
        if not present:
            return {}
        values = f1_score(
            answers.truth,
            answers.predicted,
            labels=present,
            average=None,
            zero_division=0,
        )
        return {
            answers.labels[each]: float(value) for each, value in zip(present, values, strict=True)
        }


class Matthews(Metric):
    """Matthews' correlation coefficient, of several classes too (Gorodkin, 2004)."""

    name: ClassVar[str] = "mcc"
    of: ClassVar[tuple[str, ...]] = (ONE,)

    def __call__(self, answers: Answers) -> float:
        """In [-1, 1]; 0 where either side is of one class."""
        from sklearn.metrics import matthews_corrcoef

        if len(np.union1d(_of(answers.truth), _of(answers.predicted))) < 2:
            return 0.0  # which the library says too, with a warning
        return float(matthews_corrcoef(answers.truth, answers.predicted))


class BalancedAccuracy(Metric):
    """The mean of the recalls of the classes that occur."""

    name: ClassVar[str] = "balanced_accuracy"
    of: ClassVar[tuple[str, ...]] = (ONE,)

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]."""
        from sklearn.metrics import recall_score

        present = np.unique(_of(answers.truth))
        return float(
            recall_score(
                answers.truth,
                answers.predicted,
                labels=present,
                average="macro",
                zero_division=0,
            )
        )


class Auroc(Metric):
    """The area under the ROC curve; of several classes the mean over those that occur, each against
    the rest.
    """

    name: ClassVar[str] = "auroc"
    of: ClassVar[tuple[str, ...]] = (ONE, SEVERAL)
    needs: ClassVar[tuple[str, ...]] = ("truth", "scores")

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]; nan where the rows are of one class."""
        from sklearn.metrics import roc_auc_score

        truth, scores = _of(answers.truth), _of(answers.scores)
        if truth.ndim == 2:
            return _mean_area(truth, scores)
        present = np.unique(truth)
        if len(present) < 2:
            return math.nan
        if scores.shape[1] == 2:
            return float(roc_auc_score(truth, scores[:, 1]))
        areas = [roc_auc_score(truth == each, scores[:, each]) for each in present]
        return float(np.mean(areas))


class CalibrationError(Metric):
    """The expected calibration error: how far the probability of the answer is from how often it is
    right, over ``BINS`` bins of equal width, weighted by what lies in them.
    """

    name: ClassVar[str] = "ece"
    of: ClassVar[tuple[str, ...]] = (ONE,)
    needs: ClassVar[tuple[str, ...]] = ("truth", "predicted", "scores")
    higher: ClassVar[bool] = False

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]."""
        sure = _of(answers.scores).max(axis=1)
        right = (_of(answers.truth) == _of(answers.predicted)).astype(np.float64)
        # bins are open below and closed above, but for the first
        bins = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
        gaps = np.bincount(bins, weights=right - sure, minlength=BINS)
        return float(np.abs(gaps).sum() / len(sure))


class QuadraticKappa(Metric):
    """Cohen's kappa of classes that are steps, disagreements weighed by the square of their
    distance.
    """

    name: ClassVar[str] = "qwk"
    of: ClassVar[tuple[str, ...]] = (ONE,)

    def __call__(self, answers: Answers) -> float:
        """At most 1; nan where both sides are of one class."""
        from sklearn.metrics import cohen_kappa_score

        steps = list(range(len(answers.labels)))
        if len(np.union1d(_of(answers.truth), _of(answers.predicted))) < 2:
            return math.nan
        return float(
            cohen_kappa_score(
                answers.truth,
                answers.predicted,
                labels=steps,
                weights="quadratic",
            )
        )


class StepsOff(Metric):
    """How many steps an answer is off, in the mean."""

    name: ClassVar[str] = "steps_off"
    of: ClassVar[tuple[str, ...]] = (ONE,)
    higher: ClassVar[bool] = False

    def __call__(self, answers: Answers) -> float:
        """In steps."""
        return float(np.abs(_of(answers.truth) - _of(answers.predicted)).mean())


def _present(answers: Answers) -> list[int]:
    """The numbers of the classes that occur or were answered."""
    truth, predicted = _of(answers.truth), _of(answers.predicted)
    if truth.ndim == 2:
        found: list[int] = np.flatnonzero((truth + predicted).any(axis=0)).tolist()
        return found
    both: list[int] = np.union1d(truth, predicted).tolist()
    return both


def _mean_area(truth: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    """Over the classes that some rows have and others have not; nan where there is none.

    Args:
        truth: [n, classes] of 0 and 1.
        scores: [n, classes] probabilities.
    """
    from sklearn.metrics import roc_auc_score

    told = [column for column in range(truth.shape[1]) if len(np.unique(truth[:, column])) == 2]
    if not told:
        return math.nan
    return float(np.mean([roc_auc_score(truth[:, each], scores[:, each]) for each in told]))


def _of(values: NDArray[np.float64] | None) -> NDArray[np.float64]:
    assert values is not None  # the metric says that it needs them
    return values
