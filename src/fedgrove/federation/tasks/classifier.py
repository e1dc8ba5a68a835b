"""What every classification shares: classes out of rows, a linear head on pooled states, mean
cross-entropy and accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field, Strict, field_validator
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.labels import class_among
from fedgrove.federation.metrics.base import Answers
from fedgrove.federation.otherwise import SEVERAL, OtherRows, is_list
from fedgrove.federation.readers import Place, Row, label_of
from fedgrove.federation.tasks.base import Batch, Example
from fedgrove.ground.errors import DataError
from fedgrove.ground.marks import Automatic
from fedgrove.ground.options import OF_THE_DATA, Column, Options, Text, distinct

Classes = Annotated[tuple[Text, ...], Field(min_length=2), Strict(False)]


class ClassOptions(Options):
    """The keys of rows that have a class."""

    label: Column = Field("label", description="Column of the label.")
    labels: Annotated[Classes | None, Automatic("data"), OF_THE_DATA] = Field(
        None,
        description="The classes in their order, which all sites must agree on. Not set: those in "
        "the training data, sorted.",
        examples=[["negative", "positive"]],
    )

    @field_validator("labels")
    @classmethod
    def _each_class_once(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        distinct("data.labels", labels or ())
        return labels


class Classifier:
    """The part of a Task that looks at logits and labels alone; ``labels`` in the order of the
    head's outputs.
    """

    classifies: ClassVar[bool] = True
    metric: ClassVar[str] = "accuracy"
    gives: ClassVar[tuple[str, ...]] = ("truth", "predicted", "scores")
    metrics: ClassVar[tuple[str, ...]] = (
        "f1_macro",
        "f1",
        "mcc",
        "balanced_accuracy",
        "auroc",
        "ece",
    )
    labels: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """One for each class."""
        return len(self.labels)

    def target(self, row: Row, number: int) -> int:
        """The class's number; ``number`` is the row's. Raises DataError for a label that the task
        does not have.
        """
        try:
            return self.labels.index(row["label"])
        except ValueError:
            known = ", ".join(map(repr, self.labels))
            raise DataError(
                f"row {number} has the label {row['label']!r}, but the model knows only: {known}"
            ) from None

    def targets(self, examples: Sequence[Example]) -> Int[Tensor, " b"]:
        """The classes' numbers."""
        return torch.tensor([example["label"] for example in examples], dtype=torch.long)

    def loss(self, logits: Float[Tensor, "b c"], batch: Batch) -> Float[Tensor, ""]:
        """The mean cross-entropy."""
        return F.cross_entropy(logits, batch["labels"])

    def score(self, logits: Float[Tensor, "b c"], batch: Batch) -> dict[str, float]:
        """Sums: the loss, how many are correct, how many there are."""
        labels = batch["labels"]
        return {
            "loss": float(F.cross_entropy(logits, labels, reduction="sum")),
            "correct": float((logits.argmax(-1) == labels).sum()),
            "examples": float(len(labels)),
        }

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean loss, accuracy, and the number of examples."""
        examples = sums["examples"]
        return {
            "loss": sums["loss"] / examples,
            "accuracy": sums["correct"] / examples,
            "examples": examples,
        }

    def compared(self, found: Float[Tensor, "n c"], examples: Sequence[Example]) -> Answers:
        """Classes and their probabilities."""
        scores = torch.softmax(found.double(), dim=-1).numpy()
        return Answers(
            labels=self.labels,
            truth=self.targets(examples).numpy(),
            predicted=scores.argmax(-1),
            scores=scores,
        )

    def told(self, logits: Float[Tensor, "n c"]) -> list[Any]:
        """The most likely class of each."""
        return [self.labels[index] for index in logits.argmax(dim=-1).tolist()]


def class_of(value: object, data: ClassOptions, place: Place) -> str:
    """A row's class as a text, one of ``data.labels`` where the job names them. Raises
    DataError.
    """
    if not data.labels and is_list(value):
        raise OtherRows(f"{place}: the column {data.label!r} holds a list", SEVERAL)
    label = label_of(value, data.label, place)
    if not data.labels:
        return label
    known = class_among(label, data.labels)
    if known is None:
        listed = ", ".join(map(repr, data.labels))
        raise DataError(
            f"{place}: the label {label!r} is not in data.labels ({listed}); add it or correct it"
        )
    return known
