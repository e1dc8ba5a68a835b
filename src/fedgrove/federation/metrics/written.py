"""What written texts share with their references: ROUGE (the library rouge-score), exact match."""

from __future__ import annotations

from typing import ClassVar

from fedgrove.federation.metrics.base import Answers, Metric
from fedgrove.federation.metrics.overlap import Overlap


class Shared(Metric):
    """The mean over texts of one of ``Overlap``'s figures, the best reference of each."""

    needs: ClassVar[tuple[str, ...]] = ("outputs", "references")

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]."""
        overlap = Overlap()
        pairs = zip(answers.outputs or (), answers.references or (), strict=True)
        values = [overlap(output, right)[self.name] for output, right in pairs]
        return sum(values) / len(values)


class Rouge1(Shared):
    """ROUGE-1 (F1)."""

    name: ClassVar[str] = "rouge_1"


class RougeL(Shared):
    """ROUGE-L (F1)."""

    name: ClassVar[str] = "rouge_l"


class ExactMatch(Shared):
    """Whether a text is one of its references, case, punctuation and white space aside."""

    name: ClassVar[str] = "exact_match"
