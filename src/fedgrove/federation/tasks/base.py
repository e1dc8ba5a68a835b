"""What a task is: rows out of data, examples out of rows, batches, a head on pooled states, a loss
and a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedgrove.federation.readers import Row

if TYPE_CHECKING:
    from fedgrove.federation.readers import Place
    from fedgrove.job.sections import DataSection

#: as the task needs it; of a text: "input_ids": list[int], and "label": int if it has one
Example = dict[str, Any]
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
    #: the part of a row that a trained model is asked about: "text", "image", "prompt"
    asks: ClassVar[str]
    #: what it can be read with: keys of ``training.readers.READERS``
    heads: ClassVar[tuple[str, ...]]

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
        """The model's inputs and, where the examples have labels, any number of label tensors; every
        tensor has a row for each example.
        """

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The part of a batch that is the model's input, by the names of its forward's
        arguments.
        """

    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A fresh head's tensors in float32, by name; none where the model has its own."""

    def pool(self, hidden_states: Float[Tensor, "b *t h"], batch: Batch) -> Float[Tensor, "b h"]:
        """What stands for each example as a whole."""

    def loss(self, logits: Float[Tensor, "_ *t c"], batch: Batch) -> Float[Tensor, ""]:
        """The batch's mean loss."""

    def score(self, logits: Float[Tensor, "_ *t c"], batch: Batch) -> dict[str, float]:
        """Sums over the batch, to be added up over batches and given to ``measure``."""

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means out of sums: "loss", the task's metric, and "examples"."""


class HeadedTask(Task, Protocol):
    """A task that our own head on an encoder can learn (``training.readers.Pooled``)."""

    #: what the head sees and gives logits for: an "example" [b, h] -> [b, c] as ``pool`` sums it
    #: up, or each "token" [b, t, h] -> [b, t, c]
    level: ClassVar[Literal["example", "token"]]

    def head_logits(
        self, states: Float[Tensor, "b *t h"], head: Mapping[str, Tensor]
    ) -> Float[Tensor, "b *t c"]:
        """In the head's dtype."""


class WritingTask(Task, Protocol):
    """A task of a language model (``training.readers.Writer``)."""

    max_new_tokens: int

    def positions(self, batch: Batch) -> Bool[Tensor, "b t"]:
        """True where the next token is asked for; ``loss`` and ``score`` get their logits [n,
        vocabulary], row by row.
        """

    def chosen(self, examples: Sequence[Example]) -> list[int]:
        """Which examples of an evaluation get a text written."""

    def prompts(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """What a generation starts from: ``input_ids`` and ``attention_mask`` [b, t], padded on the
        left.
        """

    def ends(self, processor: Any) -> list[int]:
        """The tokens that end a text."""

    def judge(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Sums over written texts, beside those of ``score``."""

    def shown(self, outputs: Sequence[str], examples: Sequence[Example]) -> list[dict[str, str]]:
        """Written texts beside what was asked, as plain data."""
