"""What every classification shares: classes out of rows, a linear head on pooled states, mean
cross-entropy and accuracy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

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

    class_weights: Annotated[
        Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]], OF_THE_DATA
    ] = Field(
        "none",
        description="How much each class counts in training: balanced, the rarer at a client the "
        "more, so that its classes count alike; or a table { label = weight }, 1 for the others.",
        examples=["balanced"],
    )
    ordinal: Annotated[bool, OF_THE_DATA] = Field(
        False,
        description="Whether the classes are steps, in the order of data.labels or of their "
        "numbers: an answer costs the less the nearer it is.",
    )

    @field_validator("labels")
    @classmethod
    def _each_class_once(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        distinct("data.labels", labels or ())
        return labels


class NamedLabels(Options):
    """The key of rows that may have several classes, or none."""

    labels: Annotated[
        Annotated[tuple[Text, ...], Field(min_length=1), Strict(False)] | None,
        Automatic("data"),
        OF_THE_DATA,
    ] = Field(
        None,
        description="The classes in their order, which all sites must agree on. Not set: those in "
        "the training data, sorted.",
        examples=[["negative", "positive"]],
    )

    @field_validator("labels")
    @classmethod
    def _each_label_once(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        distinct("data.labels", labels or ())
        return labels


class Classifier:
    """The part of a Task that looks at logits and labels alone; ``labels`` in the order of the
    head's outputs.
    """

    classifies: ClassVar[bool] = True
    kind: ClassVar[str] = "class"
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
    class_weights: str | dict[str, float]
    ordinal: bool

    def wanted(self) -> tuple[str, ...]:
        """As in Task: of steps also how far answers are off."""
        return (*self.metrics, "qwk", "steps_off") if self.ordinal else self.metrics

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

    def weigh(self, examples: Sequence[Example]) -> None:
        """Give the examples of one client their ``"weight"`` in the loss, where the job weighs
        classes. Balanced weights are n / (k n_c) for n examples of k classes, n_c of the own, whose
        mean is 1 (as in scikit-learn). Raises DataError for a weight of no class.
        """
        if self.class_weights == "none" or not all("label" in each for each in examples):
            return
        if not examples:  # as of a validation that was not asked for
            return
        weights = self._weights(Counter(each["label"] for each in examples))
        for each in examples:
            each["weight"] = weights[each["label"]]

    def _weights(self, counts: Counter[int]) -> dict[int, float]:
        if isinstance(self.class_weights, str):
            alike = counts.total() / len(counts)
            return {number: alike / count for number, count in counts.items()}
        for label in self.class_weights:
            if label not in self.labels:
                raise DataError(
                    f"data.class_weights has {label!r}, which is no class; the classes are "
                    f"{', '.join(map(repr, self.labels))}"
                )
        return {number: self.class_weights.get(self.labels[number], 1.0) for number in counts}

    def label_tensors(self, examples: Sequence[Example]) -> Batch:
        """The classes' numbers [b], and where classes are weighed the examples' weights [b]."""
        found: Batch = {"labels": self.targets(examples)}
        if all("weight" in each for each in examples):
            found["weights"] = torch.tensor([each["weight"] for each in examples])
        return found

    def targets(self, examples: Sequence[Example]) -> Int[Tensor, " b"]:
        """The classes' numbers."""
        return torch.tensor([example["label"] for example in examples], dtype=torch.long)

    def loss(self, logits: Float[Tensor, "b c"], batch: Batch) -> Float[Tensor, ""]:
        """The mean cross-entropy, each example's by its weight; of steps to targets that fall off
        with the square of the distance (soft labels: Díaz and Marathe, CVPR 2019).
        """
        targets = batch["labels"]
        if self.ordinal:
            steps = torch.arange(len(self.labels), device=targets.device)
            off = (steps - targets[:, None]).square().to(logits.dtype)
            targets = torch.softmax(-off, dim=-1)
        if "weights" not in batch:
            return F.cross_entropy(logits, targets)
        each = F.cross_entropy(logits, targets, reduction="none")
        return (each * batch["weights"].to(each.dtype)).mean()

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


def class_of(
    value: object,
    data: ClassOptions,
    place: Place,
) -> str:
    """A row's class as a text, one of ``data.labels`` where the job names them. Raises
    DataError.
    """
    if not data.labels and is_list(value):
        raise OtherRows(f"{place}: the column {data.label!r} holds a list", SEVERAL)
    return among_named(label_of(value, data.label, place), data.labels, place)


def among_named(
    label: str,
    labels: Sequence[str] | None,
    place: Place,
) -> str:
    """The one of ``data.labels`` that a label spells, where the job names them. Raises
    DataError.
    """
    if not labels:
        return label
    known = class_among(label, labels)
    if known is None:
        listed = ", ".join(map(repr, labels))
        raise DataError(
            f"{place}: the label {label!r} is not in data.labels ({listed}); add it or correct it"
        )
    return known
