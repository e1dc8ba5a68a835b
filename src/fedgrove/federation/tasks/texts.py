"""What every task shares whose rows are one text, or a pair of texts, that a head reads at once."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor

from fedgrove.federation.readers import Place, Row, text_of
from fedgrove.federation.tasks.base import Batch, Example, HeadedTask
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import COLUMN, OF_THE_DATA, Column, Options, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LengthOptions(Options):
    """The key of every task that cuts texts."""

    max_length: int = Field(
        128,
        ge=4,
        description="Tokens of a text, special ones included; the rest is cut off. Of generation: "
        "of prompt and completion together; a longer row loses the start of its prompt.",
    )


class TextColumnOptions(LengthOptions):
    """The keys of rows that have one text."""

    text: Column = Field("text", description="Column of the text.")


class TextOptions(TextColumnOptions):
    """The keys of rows that are texts, or pairs of them."""

    pair: Annotated[Text | None, COLUMN, OF_THE_DATA] = Field(
        None,
        description="Column of a second text, where each row is a pair (a claim and its evidence, "
        "two questions); a row may leave it empty.",
        examples=["pair"],
    )


INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TextKeys = TypeVar("TextKeys", bound=TextOptions)


class ReadsText(HeadedTask[TextKeys]):
    """Rows ``{"text": str, ...}``, with ``"pair"`` where they are pairs; cut to ``max_length``
    tokens, pooled by the mean over the tokens that are not padding.

    A task says what it learns: ``target`` out of a row, ``targets`` out of examples.
    """

    asks: ClassVar[str] = "text"
    max_length: int

    @abstractmethod
    def target(self, row: Row, number: int) -> Any:
        """What an example is to be told, out of the row of that number. Raises DataError."""

    @abstractmethod
    def targets(self, examples: Sequence[Example]) -> Shaped[Tensor, "b ..."]:
        """[b, ...] out of the examples' ``"label"``: what ``target`` gave."""

    @property
    def tokens(self) -> dict[str, int]:
        """As in Task."""
        return {"max_length": self.max_length}

    def label_tensors(self, examples: Sequence[Example]) -> Batch:
        """What a batch holds beside the model's inputs, a row for each example."""
        return {"labels": self.targets(examples)}

    def weigh(self, examples: Sequence[Example]) -> None:
        """Note on the examples of one client what the loss asks of them beside their labels."""

    # -------------------------------------------------------------------- rows
    @staticmethod
    def texts(
        values: Mapping[str, Any],
        data: TextOptions,
        place: Place,
    ) -> Row:
        """``{"text": str}``, and ``"pair": str`` where the row is a pair. Raises DataError."""
        row = {"text": text_of(values[data.text], data.text, place)}
        if data.pair and values[data.pair]:
            row["pair"] = text_of(values[data.pair], data.pair, place)
        return row

    @classmethod
    def describe(cls, rows: Sequence[Row]) -> dict[str, Any]:
        """The median number of words."""
        return {"median_words": median(len(row["text"].split()) for row in rows)}

    # ---------------------------------------------------------------- examples
    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase) -> list[Example]:
        """As in Task. Raises DataError for an answer that the task does not have."""
        encoded = [
            processor(*texts_of(row), truncation=True, max_length=self.max_length) for row in rows
        ]
        examples: list[Example] = []
        for number, (row, tokens) in enumerate(zip(rows, encoded, strict=True), start=1):
            example = _tokens(row, tokens)
            if self.learns in row:
                example["label"] = self.target(row, number)
            if not tokens["input_ids"]:
                raise DataError(
                    f"row {number} has a text that the tokenizer turns into nothing; remove it"
                )
            examples.append(example)
        self.weigh(examples)
        return examples

    def lengths(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase) -> list[int]:
        """As in Task."""
        # verbose=False: a text longer than the model's own limit is what is being asked about, not
        # a mistake
        return [
            len(processor(*texts_of(row), truncation=False, verbose=False)["input_ids"])
            for row in rows
        ]

    def truncated(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase) -> int:
        """As in Task."""
        return sum(length > self.max_length for length in self.lengths(rows, processor))

    def length(self, example: Example) -> int:
        """As in Task."""
        return len(example["input_ids"])

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As in Task: each [b, t]."""
        return {name: batch[name] for name in INPUTS if name in batch}

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """As in Task; padded on the right to the longest example of the batch."""
        batch = padded_inputs([example["input_ids"] for example in examples], pad_id)
        longest = batch["input_ids"].shape[1]
        if any("token_type_ids" in example for example in examples):
            kinds = [example.get("token_type_ids", []) for example in examples]
            batch["token_type_ids"] = padded(kinds, longest, 0)
        if all("label" in example for example in examples):
            batch |= self.label_tensors(examples)
        return batch

    def pool(self, hidden_states: Float[Tensor, "b t h"], batch: Batch) -> Float[Tensor, "b h"]:
        """The mean over the tokens that are not padding, summed in at least float32."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        mask = batch["attention_mask"][..., None].to(dtype)
        return (hidden_states.to(dtype) * mask).sum(1) / mask.sum(1).clamp(min=1)


def _tokens(row: Row, tokens: Mapping[str, Any]) -> Example:
    example: Example = {"input_ids": array("i", tokens["input_ids"])}  # a ninth of a list's memory
    if "pair" in row and "token_type_ids" in tokens:
        # only then does BERT's second kind of token occur
        example["token_type_ids"] = array("i", tokens["token_type_ids"])
    return example


def texts_of(row: Row) -> tuple[str, ...]:
    """The one or two texts of a row."""
    return (row["text"], row["pair"]) if "pair" in row else (row["text"],)


def padded_inputs(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """``input_ids`` and ``attention_mask`` [rows, t], padded on the right."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    return {
        "input_ids": padded(rows, longest, pad_id),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
    }


def padded(
    rows: Sequence[Sequence[int]],
    length: int,
    fill: int,
) -> Int[Tensor, "rows length"]:
    """Filled up on the right."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long)
