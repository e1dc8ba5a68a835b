"""How far predicted numbers are from the true ones: by SciPy."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedgrove.federation.metrics.base import Answers, Measured, Metric

Column = NDArray[np.float64]


class OfNumbers(Metric):
    """A metric of each target by itself: a number, or one for each target by its name."""

    of: ClassVar[tuple[str, ...]] = ("number",)

    def __call__(self, answers: Answers) -> Measured:
        """As ``value`` of each target; truth and predictions are [n, targets]."""
        assert answers.truth is not None
        assert answers.predicted is not None
        pairs = zip(answers.truth.T, answers.predicted.T, strict=True)
        found = [self.value(*pair) for pair in pairs]
        if len(found) == 1:
            return found[0]
        return dict(zip(answers.labels, found, strict=True))

    def value(self, truth: Column, predicted: Column) -> float:
        """Of one target; [n] and [n]."""
        raise NotImplementedError


class RootMeanSquareError(OfNumbers):
    """The root of the mean squared error, in the target's own unit."""

    name: ClassVar[str] = "rmse"
    higher: ClassVar[bool] = False

    def value(self, truth: Column, predicted: Column) -> float:
        """At least 0."""
        return float(np.sqrt(np.mean((predicted - truth) ** 2)))


class Pearson(OfNumbers):
    """Pearson's correlation."""

    name: ClassVar[str] = "pearson"

    def value(self, truth: Column, predicted: Column) -> float:
        """In [-1, 1]; nan where either side is one number."""
        from scipy.stats import pearsonr

        if _constant(truth, predicted):
            return math.nan
        return float(pearsonr(truth, predicted).statistic)


class Spearman(OfNumbers):
    """Spearman's correlation, of ranks."""

    name: ClassVar[str] = "spearman"

    def value(self, truth: Column, predicted: Column) -> float:
        """In [-1, 1]; nan where either side is one number."""
        from scipy.stats import spearmanr

        if _constant(truth, predicted):
            return math.nan
        return float(spearmanr(truth, predicted).statistic)


def _constant(*columns: Column) -> bool:
    """Whether a correlation is not defined; diverged predictions are no numbers."""
    return any(np.ptp(column) == 0 or not np.isfinite(column).all() for column in columns)
