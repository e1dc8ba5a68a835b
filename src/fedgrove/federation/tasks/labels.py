"""Several labels for a text: binary cross-entropy of each, F1 over all, a linear head on the masked
mean of the last hidden states.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.metrics.base import Answers
from fedgrove.federation.otherwise import SEVERAL, is_list
from fedgrove.federation.readers import Place, Row, label_of
from fedgrove.federation.tasks.base import Batch, Example, Stock, f1_of
from fedgrove.federation.tasks.classifier import NamedLabels, among_named
from fedgrove.federation.tasks.texts import ReadsText, TextOptions
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import OF_THE_DATA, Column, Text


class LabelsOptions(NamedLabels, TextOptions):
    """The keys of texts with several labels."""

    label: Column = Field(
        "label",
        description="Column of a row's labels: a list, or a text of them; an empty one is a row "
        "without labels.",
    )
    separator: Annotated[Text, OF_THE_DATA] = Field(
        ";",
        description="What stands between the labels where they are a text.",
    )
    threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="From which probability on a label is an answer.",
    )


@dataclass(frozen=True)
class Labels(ReadsText[LabelsOptions]):
    """``labels`` in the order of the head's outputs; k of them."""

    name: ClassVar[str] = "labels"
    about: ClassVar[str] = "any number of labels for a text"
    metric: ClassVar[str] = "f1_micro"
    metrics: ClassVar[tuple[str, ...]] = ("f1_micro", "f1_macro", "f1", "auroc")
    gives: ClassVar[tuple[str, ...]] = ("truth", "predicted", "scores")
    kind: ClassVar[str] = "labels"
    classifies: ClassVar[bool] = True
    several: ClassVar[bool] = True
    learns: ClassVar[str] = "labels"
    suits: ClassVar[tuple[str, ...]] = (SEVERAL,)
    stock: ClassVar[Stock] = Stock(problem="multi_label_classification")
    Options: ClassVar[type[LabelsOptions]] = LabelsOptions

    labels: tuple[str, ...]
    max_length: int = 128
    threshold: float = 0.5

    # -------------------------------------------------------------------- rows
    @classmethod
    def columns(cls, data: LabelsOptions) -> list[str]:
        """As in Task."""
        return [data.text, *([data.pair] if data.pair else []), data.label]

    @classmethod
    def answer_columns(cls, data: LabelsOptions) -> list[str]:
        """As in Task."""
        return [data.label]

    @classmethod
    def row(
        cls,
        values: Mapping[str, Any],
        data: LabelsOptions,
        place: Place,
    ) -> Row:
        """``{"text": str, "labels": [str, ...]}`` in the order of the names, with "label", the set of
        them; and "pair" where rows are pairs.
        """
        row = cls.texts(values, data, place)
        found = _labels_of(values[data.label], data, place)
        return {**row, **_named(among_named(each, data.labels, place) for each in found)}

    @classmethod
    def question(
        cls,
        values: Mapping[str, Any],
        data: LabelsOptions,
        place: Place,
    ) -> Row:
        """As in Task."""
        return cls.texts(values, data, place)

    @classmethod
    def classes_in(cls, row: Row) -> Sequence[str]:
        """As in Task."""
        found: list[str] = row["labels"]
        return found

    @classmethod
    def respell(cls, row: Row, names: Mapping[str, str]) -> None:
        """As in Task."""
        row.update(_named(names[label] for label in row["labels"]))

    # ---------------------------------------------------------------- examples
    def target(self, row: Row, number: int) -> list[float]:
        """1 for each label that the row has, else 0. Raises DataError for one that the task does not
        have.
        """
        for label in row["labels"]:
            if label not in self.labels:
                known = ", ".join(map(repr, self.labels))
                raise DataError(
                    f"row {number} has the label {label!r}, but the model knows only: {known}"
                )
        return [float(label in row["labels"]) for label in self.labels]

    def targets(self, examples: Sequence[Example]) -> Float[Tensor, "b k"]:
        """0 and 1."""
        return torch.tensor([example["label"] for example in examples], dtype=torch.float32)

    # ---------------------------------------------------------------- measures
    @property
    def outputs(self) -> int:
        """One for each label."""
        return len(self.labels)

    def loss(self, logits: Float[Tensor, "b k"], batch: Batch) -> Float[Tensor, ""]:
        """The mean binary cross-entropy over labels and rows."""
        return F.binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype))

    def score(self, logits: Float[Tensor, "b k"], batch: Batch) -> dict[str, float]:
        """Sums: the loss of rows, labels that are right, answered and due, rows."""
        due = batch["labels"].bool()
        answered = self._answered(logits)
        return {
            "loss": float(self.loss(logits, batch)) * len(due),
            "right": float((due & answered).sum()),
            "answered": float(answered.sum()),
            "due": float(due.sum()),
            "examples": float(len(due)),
        }

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean loss, F1 over all labels of all rows (0 where none is due and none answered)."""
        examples = sums["examples"]
        return {"loss": sums["loss"] / examples, "f1_micro": f1_of(sums), "examples": examples}

    def compared(self, found: Float[Tensor, "n k"], examples: Sequence[Example]) -> Answers:
        """Rows of 0 and 1, and probabilities."""
        return Answers(
            labels=self.labels,
            truth=self.targets(examples).numpy(),
            predicted=self._answered(found).float().numpy(),
            scores=self.probabilities(found.double()).numpy(),
        )

    def probabilities(self, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Of each label by itself."""
        return torch.sigmoid(logits)

    def told(self, logits: Float[Tensor, "n k"]) -> list[list[str]]:
        """The labels of each row, most likely first."""
        likely = self.probabilities(logits.float())
        found: list[list[str]] = []
        for row in likely.tolist():
            order = sorted(range(len(row)), key=lambda index: -row[index])
            found.append([self.labels[index] for index in order if row[index] >= self.threshold])
        return found

    def _answered(self, logits: Float[Tensor, "b k"]) -> Tensor:
        """True [b, k] where a label is an answer."""
        return self.probabilities(logits.float()) >= self.threshold


def _named(labels: Any) -> Row:
    """A row's labels, each once, and a name for the set of them."""
    own = sorted(set(labels))
    return {"labels": own, "label": " + ".join(own)}


def _labels_of(
    value: Any,
    data: LabelsOptions,
    place: Place,
) -> list[str]:
    if isinstance(value, str):
        value = _listed(value, data.separator)
    if not isinstance(value, list | tuple):
        what = "empty" if value is None else f"a {type(value).__name__}"
        raise DataError(
            f"{place}: the column {data.label!r} is {what}, not a list of labels or a text of them; "
            "write [] for a row without labels"
        )
    return [label_of(each, data.label, place) for each in value]


def _listed(text: str, separator: str) -> list[Any]:
    """The labels of a text: a list as JSON or Python writes it, or separated."""
    if is_list(text.strip()):
        return list(ast.literal_eval(text.strip()))
    return [part.strip() for part in text.split(separator) if part.strip()]
