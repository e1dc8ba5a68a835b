"""A task: a text is rated by a number, its mean squared error is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.federation.metrics import Answers
from fedgrove.federation.otherwise import NUMBERS
from fedgrove.federation.readers import Place, Row
from fedgrove.federation.tasks.base import Batch, Example
from fedgrove.federation.tasks.texts import ReadsText, TextOptions
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import Column


class RatingOptions(TextOptions):
    """The task's keys in ``[data]``, beside those of every text."""

    rating: Column = Field("rating", description="Column of the number to learn.")
    middle: float = Field(0.0, description="What is taken off each number before it is learnt.")


@dataclass(frozen=True)
class RateText(ReadsText[RatingOptions]):
    """Reading, cutting and pooling are those of every text, the head is a linear one: what is left
    is the number.
    """

    name: ClassVar[str] = "rate-text"
    about: ClassVar[str] = "a number for a text"
    metric: ClassVar[str] = "r2"
    gives: ClassVar[tuple[str, ...]] = ("truth", "predicted")
    learns: ClassVar[str] = "rating"
    suits: ClassVar[tuple[str, ...]] = (NUMBERS,)
    Options: ClassVar[type[RatingOptions]] = RatingOptions

    max_length: int = 128
    middle: float = 0.0

    @property
    def outputs(self) -> int:
        """One number."""
        return 1

    @classmethod
    def columns(cls, data: RatingOptions) -> list[str]:
        """As in Task."""
        return [data.text, *([data.pair] if data.pair else []), data.rating]

    @classmethod
    def row(cls, values: Mapping[str, Any], data: RatingOptions, place: Place) -> Row:
        """``{"text": str, "rating": float, "label": ""}``: there is no label to split by."""
        try:
            rating = float(values[data.rating])
        except (TypeError, ValueError):
            raise DataError(
                f"{place}: the column {data.rating!r} is no number; correct or remove the row"
            ) from None
        return {**cls.texts(values, data, place), "rating": rating, "label": ""}

    def target(self, row: Row, number: int) -> float:
        """As in ReadsText."""
        return float(row["rating"]) - self.middle

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """[b] float32."""
        return torch.tensor([example["label"] for example in examples])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean squared error; logits [b, 1]."""
        return (logits[:, 0] - batch["labels"]).square().mean()

    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Sums of squared errors, of the numbers and of their squares; logits [b, 1]."""
        truth = batch["labels"].double()
        missed = (logits[:, 0].double() - truth).square()
        return {
            "missed": float(missed.sum()),
            "sum": float(truth.sum()),
            "squares": float(truth.square().sum()),
            "examples": float(len(truth)),
        }

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The mean squared error, and the share of the numbers' variance that is explained."""
        count = sums["examples"]
        spread = sums["squares"] - sums["sum"] ** 2 / count
        explained = 1 - sums["missed"] / spread if spread > 0 else 0.0
        return {"loss": sums["missed"] / count, "r2": explained, "examples": count}

    def compared(self, found: Tensor, examples: Sequence[Example]) -> Answers:
        """Numbers beside numbers, out of logits [n, 1]."""
        return Answers(truth=self.targets(examples).numpy(), predicted=found[:, 0].numpy())

    def told(self, logits: Tensor) -> list[float]:
        """As a user knows the number; logits [n, 1]."""
        return [value + self.middle for value in logits[:, 0].tolist()]
