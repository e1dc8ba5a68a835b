"""What a task is: rows out of data, examples out of rows, batches, a head on pooled states, a loss
and a score.

A new task is one file: a class that extends ``HeadedTask`` or ``WritingTask`` (or ``ReadsText``,
``Classifier``, which do part of it), has a name, and is a frozen dataclass whose fields are settings. It lies in this
folder, or in a package of its own with an entry point of the group ``fedgrove.tasks``, or is given
to ``fedgrove.federation.tasks.register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.readers import Row
from fedgrove.ground import options

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from fedgrove.federation.metrics.base import Answers
    from fedgrove.federation.readers import Found, Place

#: as the task needs it; of a text: "input_ids": list[int], and "label": int if it has one
Example = dict[str, Any]
Batch = dict[str, Tensor]
#: of a setting that cards tell where it is not the default, as cards of earlier versions lack it
SAID_WHERE_SET = {"said": "where set"}
Keys = TypeVar("Keys", bound=options.Options)
_FILLED = "?"  # stands for an answer that a table lacks, while its row is checked


@dataclass(frozen=True)
class Stock:
    """What others call a whole model of the task, with the checkpoint's own head."""

    auto: str = "AutoModelForSequenceClassification"  # its class in transformers
    peft: str | None = "SEQ_CLS"  # PEFT's task_type
    problem: str | None = None  # problem_type in config.json: what the head's outputs mean


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
    heads: ClassVar[tuple[str, ...]]  # what it can be read with: ``training.readers.READERS``
    writes: ClassVar[bool] = False  # whether a model answers with a text
    reads: ClassVar[Literal["text", "images"]] = "text"
    classifies: ClassVar[bool] = False  # whether rows have classes, which all clients must agree on
    #: whether a row may have several classes, or none: its "label" then names the set of them
    several: ClassVar[bool] = False
    #: what answers are, for metrics that are of some kind alone: "class", "labels", "number", ...
    kind: ClassVar[str] = ""
    stock: ClassVar[Stock] = Stock()
    asks: ClassVar[str]  # the part of a row that a model is asked about: "text", "image", "prompt"
    #: further parts of a row that a model is asked about with it; one that writes may go without
    beside: ClassVar[tuple[str, ...]] = ()
    learns: ClassVar[str] = "label"  # the part of a row that is to be learnt
    #: whether ``encode`` may give several examples of a row, which ``judged`` puts together again
    windows: ClassVar[bool] = False
    #: what rows are that it learns, where another task points to it: see ``federation.otherwise``
    suits: ClassVar[tuple[str, ...]] = ()
    #: rows of a batch that an example is, next to each other: 2 where it is two answers to compare
    rows_each: ClassVar[int] = 1
    #: whether rows may lie as files in a folder for each label
    folders: ClassVar[bool] = False

    labels: tuple[str, ...] = ()  # the classes in the order of the head's outputs

    @property
    def outputs(self) -> int:
        """c: how many numbers the head gives; 0 where there is none."""
        return len(self.labels)

    @property
    def output_names(self) -> tuple[str, ...]:
        """What the head's outputs are called, in their order; () where they have no names."""
        return self.labels

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
        settings: dict[str, Any] = {}
        for each in _settings(type(self)):
            value = getattr(self, each.name)
            if value != each.default or each.metadata != SAID_WHERE_SET:
                settings[each.name] = value
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
    def row(
        cls,
        values: Mapping[str, Any],
        data: Keys,
        place: Place,
    ) -> Row:
        """A checked row, with a "label" to split by (a class, or "" where there is none). Raises
        DataError.
        """

    @classmethod
    def answer_columns(cls, data: Keys) -> list[str]:
        """Those of ``columns`` that hold what is learnt."""
        return [getattr(data, cls.learns)] if hasattr(data, cls.learns) else []

    @classmethod
    def question(
        cls,
        values: Mapping[str, Any],
        data: Keys,
        place: Place,
    ) -> Row:
        """A checked row without its answer, out of the other columns. Raises DataError."""
        known = getattr(data, "labels", None) or (_FILLED,)
        filled = dict.fromkeys(cls.answer_columns(data), known[0])
        row = cls.row({**values, **filled}, data, place)
        return {key: value for key, value in row.items() if key != cls.learns}

    @classmethod
    def classes_in(cls, row: Row) -> Sequence[str]:
        """The classes of a row, where rows have classes."""
        return (row["label"],)

    @classmethod
    def respell(cls, row: Row, names: Mapping[str, str]) -> None:
        """Give the row's classes these names."""
        row["label"] = names[row["label"]]

    @classmethod
    def lacks(cls, data: Keys) -> tuple[str, str] | None:
        """What clients that do not see each other's rows must be told: the key of ``[data]`` and
        what it says; None where nothing is missing.
        """
        if cls.classifies and not getattr(data, "labels", None):
            return "labels", "the classes"
        return None

    @classmethod
    def settled(cls, data: Keys, rows: Sequence[Row]) -> dict[str, Any]:
        """The keys of ``[data]`` that a job leaves to its training rows, besides the classes.

        Raises DataError where the rows cannot say.
        """
        return {}

    @classmethod
    def in_folder(
        cls,
        folder: Path,
        data: Keys,
        source: str,
    ) -> Found:
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
        """The model's inputs and, where the examples have labels, any number of label tensors; every
        tensor has a row for each example, or ``rows_each`` of them.
        """

    def prime(
        self,
        base: Callable[[Sequence[Example]], Float[Tensor, "n *t c"]],
        examples: Sequence[Example],
    ) -> None:
        """Note on a client's examples what the loss asks of the untouched base about each; ``base``
        gives its answers by example. Called before any pass, with all of a split: what is noted already
        stays.
        """

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The part of a batch that is the model's input, tensors [b, ...] by the names of its
        forward's arguments.
        """

    # -------------------------------------------------------------------- head
    def read(self, output: Any) -> Float[Tensor, "b *t c"]:
        """The logits in what a model with a head of its own gives."""
        logits: Tensor = output.logits
        return logits

    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A fresh head's tensors in float32, [any shape] by name; none where the model has its own."""
        return {}

    def check_head(self, head: Mapping[str, Tensor]) -> None:
        """Raises JobError where the head's tensors, [any shape] by name, cannot learn the task."""

    @abstractmethod
    def pool(self, hidden_states: Float[Tensor, "b *t h"], batch: Batch) -> Float[Tensor, "b h"]:
        """What stands for each example as a whole."""

    # ---------------------------------------------------------------- measures
    @abstractmethod
    def loss(self, logits: Float[Tensor, "_ *t c"], batch: Batch) -> Float[Tensor, ""]:
        """The batch's mean loss."""

    @abstractmethod
    def score(self, logits: Float[Tensor, "_ *t c"], batch: Batch) -> dict[str, float]:
        """Sums over the batch, to be added up over batches and given to ``measure``."""

    def judged(
        self, logits: Sequence[Float[Tensor, "_ *t c"]], examples: Sequence[Example]
    ) -> dict[str, float]:
        """Sums over rows out of the logits of all their examples, beside those of ``score``; asked
        where ``windows`` says that a row may have several.
        """
        return {}

    @abstractmethod
    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means out of sums: "loss", the task's metric, and "examples"."""

    def wanted(self) -> tuple[str, ...]:
        """The names of the metrics that a finished model is measured by."""
        return self.metrics

    def compared(self, found: Any, examples: Sequence[Example]) -> Answers:
        """What a model answered beside what was right, for metrics: ``found`` are logits [n, c], of
        a writer the n texts that it wrote.
        """
        raise NotImplementedError(f"{self.name} says nothing for metrics to compare")

    def by_example(self, logits: Float[Tensor, "_ *t c"], batch: Batch) -> Float[Tensor, "_ *t c"]:
        """A batch's logits as one answer for each example, which ``told`` and ``compared`` get."""
        return logits

    def written(self, rows: Sequence[Row]) -> bool:
        """Whether the answers to these rows are texts that the model writes."""
        return self.writes

    def told(self, logits: Float[Tensor, "n *t c"]) -> list[Any]:
        """The answers that a user is told."""
        return list(logits.tolist())

    def told_of(self, logits: Float[Tensor, "n *t c"], examples: Sequence[Example]) -> list[Any]:
        """As ``told``, where an answer also depends on the example that it is about."""
        return self.told(logits)

    def probabilities(self, logits: Float[Tensor, "n *t c"]) -> Float[Tensor, "n *t c"]:
        """How likely each output is, in the logits' precision."""
        return torch.softmax(logits, dim=-1)

    def scored(self, logits: Float[Tensor, "n *t c"]) -> list[dict[str, float]]:
        """By label, how likely it is, where rows have classes; {} where answers have no such scores."""
        likely = self.probabilities(logits.double()).tolist()
        return [dict(zip(self.labels, row, strict=False)) for row in likely]

    # ------------------------------------------------------------------ leaving
    def leaving(self, head: Mapping[str, Tensor]) -> tuple[Task[Keys], dict[str, Tensor]]:
        """The task and the head as they stand in an adapter directory, for whoever reads it without
        us; tensors [any shape] keep their shapes and names.
        """
        return self, dict(head)


class HeadedTask(Task[Keys]):
    """A task that our own head on an encoder can learn (``training.readers.Pooled``): one linear
    layer, unless the task has another.
    """

    heads: ClassVar[tuple[str, ...]] = ("pooled", "stock")
    #: what the head sees and gives logits for: an "example" [b, h] -> [b, c] as ``pool`` sums it
    #: up, or each "token" [b, t, h] -> [b, t, c]
    level: ClassVar[Literal["example", "token"]] = "example"

    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """weight [c, h] from N(0, 0.02²), bias [c] of zeros."""
        weight = torch.randn(self.outputs, hidden, generator=generator) * 0.02
        return {"weight": weight, "bias": torch.zeros(self.outputs)}

    def head_logits(
        self, states: Float[Tensor, "b *t h"], head: Mapping[str, Tensor]
    ) -> Float[Tensor, "b *t c"]:
        """In the head's dtype."""
        return F.linear(states.to(head["weight"].dtype), head["weight"], head["bias"])


class WritingTask(Task[Keys]):
    """A task of a language model (``training.readers.Writer``)."""

    heads: ClassVar[tuple[str, ...]] = ("lm",)
    stock: ClassVar[Stock] = Stock("AutoModelForCausalLM", "CAUSAL_LM")
    writes: ClassVar[bool] = True
    max_new_tokens: int

    @abstractmethod
    def positions(self, batch: Batch) -> Bool[Tensor, "b t"]:
        """True where the next token is asked for; ``loss`` and ``score`` get their logits [n,
        vocabulary], row by row.
        """

    @abstractmethod
    def chosen(self, examples: Sequence[Example]) -> list[int]:
        """Which examples of an evaluation get a text written."""

    @abstractmethod
    def prompts(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """What a generation starts from: ``input_ids`` and ``attention_mask`` [b, t], padded on the
        left.
        """

    @abstractmethod
    def ends(self, processor: Any) -> list[int]:
        """The tokens that end a text."""

    @abstractmethod
    def judge(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Sums over written texts, beside those of ``score``."""

    @abstractmethod
    def shown(self, outputs: Sequence[str], examples: Sequence[Example]) -> list[dict[str, str]]:
        """Written texts beside what was asked, as plain data."""


def _settings(kind: type[Task]) -> tuple[Field[Any], ...]:
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


def f1_of(sums: Mapping[str, float]) -> float:
    """F1 of the sums "right", "answered" and "due"; 0 where none is due and none answered."""
    both = sums["answered"] + sums["due"]
    if not both:
        return 0.0
    return 2 * sums["right"] / both
