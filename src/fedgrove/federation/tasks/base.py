"""What a task is: rows out of data, examples out of rows, batches, a head on pooled states, a loss
and a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedgrove.federation.readers import Row

if TYPE_CHECKING:
    from fedgrove.federation.readers import Place
    from fedgrove.job.sections import DataSection

Example = dict[
    str, Any
]  # as the task needs it; of a text: "input_ids": list[int], and "label": int if it has one
Batch = dict[str, Tensor]


class Task(Protocol):
    """Shapes: b examples, t tokens of the longest in the batch, h hidden size, c outputs of the
    head.

    A *processor* is the model's own tokenizer or image processor.
    """

    @property
    def name(self) -> str:
        """As ``summary.json`` names the task."""

    @property
    def metric(self) -> str:
        """The key of ``measure`` that says how good a model is; higher is better."""

    classifies: ClassVar[bool]  # whether rows have classes that a head learns
    asks: ClassVar[
        str
    ]  # the part of a row that a trained model is asked about: "text", "image", "prompt"

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the head's outputs; empty where the task has none."""

    @classmethod
    def of(cls, data: DataSection) -> Task:
        """The task with a job's settings."""

    def card(self) -> dict[str, Any]:
        """What an adapter directory says of the task, as JSON: "task" (its name), "labels", and its
        own settings.
        """

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Task:
        """The task of an adapter directory."""

    @staticmethod
    def columns(data: DataSection) -> list[str]:
        """The columns of the source that ``row`` reads."""

    @staticmethod
    def row(values: Mapping[str, Any], data: DataSection, place: Place) -> Row:
        """A checked row, with a "label" to split by (a class, or "" where there is none). Raises
        DataError.
        """

    @staticmethod
    def describe(rows: Sequence[Row]) -> dict[str, Any]:
        """Plain figures about a client's rows for ``fedgrove data``, for example their median
        length.
        """

    def encode(self, rows: Sequence[Row], processor: Any) -> list[Example]:
        """The rows as the model reads them. Raises DataError for what it cannot read."""

    def lengths(self, rows: Sequence[Row], processor: Any) -> list[int]:
        """Tokens of each row before anything is cut; [] where rows are not sequences."""

    def truncated(self, rows: Sequence[Row], processor: Any) -> int:
        """How many rows ``encode`` cuts."""

    def length(self, example: Example) -> int:
        """Examples of similar length make a batch with little padding (0 where all are alike)."""

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """The model's inputs and, where the examples have labels, labels."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The part of a batch that is the model's input, by the names of its forward's
        arguments.
        """

    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A fresh head's tensors in float32, by name."""

    def pool(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """[b, t, h] -> [b, h]."""

    def head_logits(self, pooled: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """[b, h] -> [b, c], in the head's dtype."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The batch's mean loss, a scalar."""

    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Sums over the batch, to be added up over batches and given to ``measure``."""

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means out of sums: "loss", the task's metric, and "examples"."""
