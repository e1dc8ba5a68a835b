"""What a task is: rows out of data, examples out of rows, batches, a head on pooled states, a loss
and a score.

A new task is one file: a class that extends ``Task`` (or ``ReadsText``, ``Classifier``, which do
part of it), has a name, and is a frozen dataclass whose fields are settings. It lies in this
folder, or in a package of its own with an entry point of the group ``fedgrove.tasks``, or is given
to ``fedgrove.federation.tasks.register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.readers import Row
from fedgrove.ground import options

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from fedgrove.federation.metrics.base import Answers
    from fedgrove.federation.readers import Found, Place

Example = dict[
    str, Any
]  # as the task needs it; of a text: "input_ids": list[int], and "label": int if it has one
Batch = dict[str, Tensor]
Keys = TypeVar("Keys", bound=options.Options)


class Task(ABC, Generic[Keys]):
    """Shapes: b examples, t tokens of the longest in the batch, h hidden size, c outputs of the
    head.

    A *processor* is the model's own tokenizer or image processor. ``data`` is the job's ``[data]``
    section: it has the keys that the task's ``Options`` declare.
    """

    name: ClassVar[str]  # of data.task, of summary.json and of an adapter's card
    about: ClassVar[str]  # what is learnt, in a few words, for `fedgrove job --explain`
    metric: ClassVar[str]  # the key of ``measure`` that says how good a model is; higher is better
    gives: ClassVar[tuple[str, ...]] = ()  # what metrics may compare: fields of Answers
    #: further measures of a finished model, by the names of metrics
    metrics: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type[options.Options]] = options.Options
    #: what reads the model's states: a head on pooled ones, or the model's own output layer
    reader: ClassVar[Literal["head", "writer"]] = "head"
    reads: ClassVar[Literal["text", "images"]] = "text"
    classifies: ClassVar[bool] = False  # whether rows have classes, which all clients must agree on
    asks: ClassVar[str]  # the part of a row that a model is asked about: "text", "image", "prompt"
    learns: ClassVar[str] = "label"  # the part of a row that is to be learnt
    #: whether rows may lie as files in a folder for each label
    folders: ClassVar[bool] = False

    labels: tuple[str, ...] = ()  # the classes in the order of the head's outputs

    @property
    def outputs(self) -> int:
        """c: how many numbers the head gives; 0 where there is none."""
        return len(self.labels)

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens that the model must hold at once, by the keys of ``[data]`` that say so."""
        return {}

    # ---------------------------------------------------------------- settings
    @classmethod
    def of(cls, data: Keys) -> Self:
        """The task with a job's settings: its fields are keys of ``data`` by the same names."""
        given = {each.name: getattr(data, each.name) for each in _settings(cls)}
        return cls(**_with_tuples(given))

    def card(self) -> dict[str, Any]:
        """What an adapter directory says of the task, as JSON: "task" (its name), "labels", and its
        own settings.
        """
        settings = {each.name: getattr(self, each.name) for each in _settings(type(self))}
        return {"task": self.name, "labels": list(self.labels), **_with_lists(settings)}

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Self:
        """The task of an adapter directory; a setting that its card lacks has its default."""
        kept = {each.name: card[each.name] for each in _settings(cls) if each.name in card}
        return cls(**_with_tuples(kept))

    # -------------------------------------------------------------------- rows
    @classmethod
    @abstractmethod
    def columns(cls, data: Keys) -> list[str]:
        """The columns of the source that ``row`` reads."""

    @classmethod
    @abstractmethod
    def row(cls, values: Mapping[str, Any], data: Keys, place: Place) -> Row:
        """A checked row, with a "label" to split by (a class, or "" where there is none). Raises
        DataError.
        """

    @classmethod
    def in_folder(cls, folder: Path, data: Keys, source: str) -> Found:
        """Rows with the columns above out of files that lie in a folder for each label, where
        ``folders`` says that there may be such; ``source``, the job's, helps to say what was meant.
        """
        raise NotImplementedError(f"{cls.name} reads no folders")

    @classmethod
    def describe(cls, rows: Sequence[Row]) -> dict[str, Any]:
        """Plain figures about a client's rows for ``fedgrove data``, for example their median
        length.
        """
        return {}

    # ---------------------------------------------------------------- examples
    @abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any) -> list[Example]:
        """The rows as the model reads them. Raises DataError for what it cannot read."""

    def lengths(self, rows: Sequence[Row], processor: Any) -> list[int]:
        """Tokens of each row before anything is cut; [] where rows are not sequences."""
        return []

    def truncated(self, rows: Sequence[Row], processor: Any) -> int:
        """How many rows ``encode`` cuts."""
        return 0

    def length(self, example: Example) -> int:
        """Examples of similar length make a batch with little padding (0 where all are alike)."""
        return 0

    @abstractmethod
    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """The model's inputs and, where the examples have labels, labels."""

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The part of a batch that is the model's input, by the names of its forward's
        arguments.
        """

    # -------------------------------------------------------------------- head
    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A fresh head's tensors in float32, by name: weight [c, h], bias [c]; {} without a
        head.
        """
        return {}

    @abstractmethod
    def pool(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """[b, t, h] -> [b, h]."""

    def head_logits(self, pooled: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """[b, h] -> [b, c], in the head's dtype."""
        raise NotImplementedError(f"{self.name} has no head on pooled states")

    # ---------------------------------------------------------------- measures
    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The batch's mean loss, a scalar; logits [b, c], of a writer [n, vocabulary]."""

    @abstractmethod
    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Sums over the batch, to be added up over batches and given to ``measure``; logits as in
        ``loss``.
        """

    @abstractmethod
    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means out of sums: "loss", the task's metric, and "examples"."""

    def answers(self, found: Any, examples: Sequence[Example]) -> Answers:
        """What a model answered beside what was right, for metrics: ``found`` are logits [n, c], of
        a writer the n texts that it wrote.
        """
        raise NotImplementedError(f"{self.name} says nothing for metrics to compare")

    def told(self, logits: Tensor) -> list[Any]:
        """The answers that a user is told, out of logits [n, c]."""
        return list(logits.tolist())


class LinearHead:
    """The part of a Task whose head is one linear layer on pooled states."""

    @property
    def outputs(self) -> int:
        """As in Task."""
        raise NotImplementedError

    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """weight [c, h] from N(0, 0.02²), bias [c] of zeros."""
        weight = torch.randn(self.outputs, hidden, generator=generator) * 0.02
        return {"weight": weight, "bias": torch.zeros(self.outputs)}

    def head_logits(self, pooled: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """[b, h] -> [b, c]."""
        return F.linear(pooled.to(head["weight"].dtype), head["weight"], head["bias"])


def _settings(kind: type[Task[Any]]) -> tuple[Field[Any], ...]:
    """The dataclass's fields."""
    return fields(cast(Any, kind))


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists, which JSON has, as the tuples that a frozen task holds; no labels yet are ()."""
    found = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    if "labels" in found:
        found["labels"] = tuple(found["labels"] or ())
    return found


def _with_lists(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }
