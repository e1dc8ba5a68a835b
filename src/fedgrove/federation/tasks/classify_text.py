"""Text classification: mean cross-entropy, accuracy, and a linear head on the masked mean of the
last hidden states.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.federation.readers import Place, Row, text_of
from fedgrove.federation.tasks.base import Batch, Example
from fedgrove.federation.tasks.classifier import Classifier, class_of
from fedgrove.ground.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedgrove.job.sections import DataSection


@dataclass(frozen=True)
class ClassifyText(Classifier):
    """``labels`` in the order of the head's outputs; texts are cut to ``max_length`` tokens."""

    labels: tuple[str, ...]
    max_length: int = 128
    name: str = "classify-text"
    classifies: ClassVar[bool] = True
    asks: ClassVar[str] = "text"
    metric: str = "accuracy"

    @classmethod
    def of(cls, data: DataSection) -> ClassifyText:
        """As in Task."""
        return cls(labels=tuple(data.labels or ()), max_length=data.max_length)

    def card(self) -> dict[str, Any]:
        """As in Task."""
        return {"task": self.name, "labels": list(self.labels), "max_length": self.max_length}

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> ClassifyText:
        """As in Task."""
        return cls(labels=tuple(card["labels"]), max_length=int(card["max_length"]))

    @staticmethod
    def columns(data: DataSection) -> list[str]:
        """As in Task."""
        return [data.text, *([data.pair] if data.pair else []), data.label]

    @staticmethod
    def row(values: Mapping[str, Any], data: DataSection, place: Place) -> Row:
        """``{"text": str, "label": str}``, and ``"pair": str`` where the rows are pairs of
        texts.
        """
        row = {
            "text": text_of(values[data.text], data.text, place),
            "label": class_of(values[data.label], data, place),
        }
        if data.pair and values[data.pair]:
            row["pair"] = text_of(values[data.pair], data.pair, place)
        return row

    @staticmethod
    def describe(rows: Sequence[Row]) -> dict[str, Any]:
        """The median number of words."""
        return {"median_words": median(len(row["text"].split()) for row in rows)}

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """As in Task. Raises DataError for a label that the task does not have."""
        if not rows:
            return []
        encoded = [
            tokenizer(*texts_of(row), truncation=True, max_length=self.max_length) for row in rows
        ]
        numbers = {label: number for number, label in enumerate(self.labels)}
        examples: list[Example] = []
        for number, (row, tokens) in enumerate(zip(rows, encoded, strict=True), start=1):
            ids = tokens["input_ids"]
            example: Example = {"input_ids": array("i", ids)}  # a ninth of a list's memory
            if (
                "pair" in row and "token_type_ids" in tokens
            ):  # only then does BERT's second kind of token occur
                example["token_type_ids"] = array("i", tokens["token_type_ids"])
            if "label" in row:
                if row["label"] not in numbers:
                    known = ", ".join(map(repr, self.labels))
                    raise DataError(
                        f"row {number} has the label {row['label']!r}, but the model knows only: "
                        f"{known}"
                    )
                example["label"] = numbers[row["label"]]
            if not ids:
                raise DataError(
                    f"row {number} has a text that the tokenizer turns into nothing; remove it"
                )
            examples.append(example)
        return examples

    def lengths(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """As in Task."""
        # verbose=False: a text longer than the model's own limit is what is being asked about, not
        # a mistake
        return [
            len(tokenizer(*texts_of(row), truncation=False, verbose=False)["input_ids"])
            for row in rows
        ]

    def truncated(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> int:
        """As in Task."""
        return sum(length > self.max_length for length in self.lengths(rows, tokenizer))

    def length(self, example: Example) -> int:
        """As in Task."""
        return len(example["input_ids"])

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As in Task."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """As in Task; padded on the right to the longest example of the batch."""
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        longest = int(lengths.max())
        batch = {
            "input_ids": padded([example["input_ids"] for example in examples], longest, pad_id),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }
        if any("token_type_ids" in example for example in examples):
            kinds = [example.get("token_type_ids", []) for example in examples]
            batch["token_type_ids"] = padded(kinds, longest, 0)
        if all("label" in example for example in examples):
            batch["labels"] = torch.tensor(
                [example["label"] for example in examples], dtype=torch.long
            )
        return batch

    def pool(self, hidden_states: Float[Tensor, "b t h"], batch: Batch) -> Float[Tensor, "b h"]:
        """The mean over the tokens that are not padding, summed in at least float32."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        mask = batch["attention_mask"][..., None].to(dtype)
        return (hidden_states.to(dtype) * mask).sum(1) / mask.sum(1).clamp(min=1)


def texts_of(row: Row) -> tuple[str, ...]:
    """The one or two texts of a row."""
    return (row["text"], row["pair"]) if "pair" in row else (row["text"],)


def padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    """[rows, length] int64, filled up on the right."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long)
