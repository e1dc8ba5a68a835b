"""What a metric is: a number, or a number for each class, out of a model's answers beside what was
right.

A new metric is one file: a class that extends ``Metric``, has a name and says what it needs. It
lies in this folder, or in a package of its own with an entry point of the group
``fedgrove.metrics``, or is given to ``fedgrove.federation.metrics.register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Measured = float | dict[str, float]


@dataclass(frozen=True)
class Answers:
    """n answers. What a task does not know of is None; a metric gets what it ``needs``."""

    labels: tuple[str, ...] = ()  # the names of the classes
    #: [n] class numbers, [n, classes] of 0 and 1 where a row may have several classes, [n, targets]
    #: numbers, or n lists of tags; and what else a task learns
    truth: NDArray[Any] | None = None
    predicted: NDArray[Any] | None = None  # as truth
    scores: NDArray[np.float64] | None = None  # [n, classes] probabilities
    outputs: Sequence[str] | None = None  # n texts
    references: Sequence[Sequence[str]] | None = None  # n lists of right texts


class Metric(ABC):
    """One metric. It is called once for all answers of one client."""

    name: ClassVar[str]  # in data.metrics, and in what is measured
    needs: ClassVar[tuple[str, ...]] = ("truth", "predicted")  # fields of Answers
    #: the kinds of answers that it is for (``Task.kind``); () for any
    of: ClassVar[tuple[str, ...]] = ()
    higher: ClassVar[bool] = True  # whether a larger value is better

    @abstractmethod
    def __call__(self, answers: Answers) -> Measured:
        """The value, by class where the metric has one for each; nan where it is not defined (an
        AUROC of one class).
        """
