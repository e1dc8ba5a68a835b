"""How well entities are found: by seqeval, an entity being right where its words and its type are."""

from __future__ import annotations

from typing import Any, ClassVar

from fedgrove.federation.metrics.base import Answers, Metric


class OfTags(Metric):
    """A metric of words' tags."""

    of: ClassVar[tuple[str, ...]] = ("tags",)


class EntityF1(OfTags):
    """F1 over all entities."""

    name: ClassVar[str] = "entity_f1"

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]."""
        from seqeval.metrics import f1_score

        return float(f1_score(*_tags(answers), zero_division=0))


class EntityPrecision(OfTags):
    """The share of the answered entities that are right."""

    name: ClassVar[str] = "entity_precision"

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]."""
        from seqeval.metrics import precision_score

        return float(precision_score(*_tags(answers), zero_division=0))


class EntityRecall(OfTags):
    """The share of the entities that were found."""

    name: ClassVar[str] = "entity_recall"

    def __call__(self, answers: Answers) -> float:
        """In [0, 1]."""
        from seqeval.metrics import recall_score

        return float(recall_score(*_tags(answers), zero_division=0))


class EntityF1ByType(OfTags):
    """F1 of each type that occurs or was answered."""

    name: ClassVar[str] = "entity_f1_by_type"

    def __call__(self, answers: Answers) -> dict[str, float]:
        """By the type's name."""
        from seqeval.metrics import classification_report

        truth, predicted = _tags(answers)
        present = {tag[2:] for row in (*truth, *predicted) for tag in row if tag != "O"}
        if not present:
            return {}
        table: dict[str, Any] = classification_report(
            truth,
            predicted,
            output_dict=True,
            zero_division=0,
        )
        return {kind: float(table[kind]["f1-score"]) for kind in sorted(present)}


def _tags(answers: Answers) -> tuple[list[list[str]], list[list[str]]]:
    assert answers.truth is not None
    assert answers.predicted is not None
    return list(answers.truth), list(answers.predicted)
