"""A metric: how far an answer is from what was right, in the mean."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedgrove.federation.metrics import Answers, Metric


class MeanMiss(Metric):
    """The mean absolute error of numbers."""

    name: ClassVar[str] = "mean_miss"
    needs: ClassVar[tuple[str, ...]] = ("truth", "predicted")
    higher: ClassVar[bool] = False

    def __call__(self, answers: Answers) -> float:
        """In the numbers' own unit."""
        return float(np.mean(np.abs(np.asarray(answers.truth) - np.asarray(answers.predicted))))
