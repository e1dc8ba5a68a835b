"""Numbers for a text: the squared error of each, scaled, and a linear head on the masked mean of the
last hidden states.

Targets are learnt as (y - center) / scale. One center and one scale for all clients, so that a head
can be shared and its numbers mean the same everywhere: the job names them (``data.center``,
``data.scale``), or a simulation takes mean and standard deviation over the training rows of the
clients that train, and writes them into its job. What leaves gives true units: both are folded into
the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, Strict, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.metrics.base import Answers
from fedgrove.federation.otherwise import NUMBERS
from fedgrove.federation.readers import Place, Row
from fedgrove.federation.tasks.base import SAID_WHERE_SET, Batch, Example, Stock
from fedgrove.federation.tasks.texts import ReadsText, TextOptions
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.marks import Automatic
from fedgrove.ground.options import OF_THE_DATA, Texts, distinct
from fedgrove.ground.toml import shown

Numbers = Annotated[tuple[float, ...], Field(min_length=1), Strict(False)]
Positive = Annotated[float, Field(gt=0)]


class RegressionOptions(TextOptions):
    """The keys of texts with numbers."""

    targets: Annotated[Texts, OF_THE_DATA] = Field(
        ("target",),
        description="Columns of the numbers to predict, one or several.",
    )
    center: Annotated[Numbers | None, Automatic("data"), OF_THE_DATA] = Field(
        None,
        description="What is taken off each target before it is learnt, a number for each. Not set: "
        "its mean over the training rows of the clients that train.",
        examples=[[3.5]],
    )
    scale: Annotated[
        Annotated[tuple[Positive, ...], Field(min_length=1), Strict(False)] | None,
        Automatic("data"),
        OF_THE_DATA,
    ] = Field(
        None,
        description="What the rest is divided by. Not set: its root mean square over those rows.",
        examples=[[1.2]],
    )

    @field_validator("targets")
    @classmethod
    def _each_target_once(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        distinct("data.targets", targets)
        return targets

    @model_validator(mode="after")
    def _a_number_for_each_target(self) -> Self:
        for key, numbers in (("center", self.center), ("scale", self.scale)):
            if numbers is not None and len(numbers) != len(self.targets):
                raise ValueError(
                    f"data.{key} = {shown(numbers)} has {len(numbers)} numbers, but there are "
                    f"{len(self.targets)} data.targets; give one for each."
                )
        return self


@dataclass(frozen=True)
class Regression(ReadsText[RegressionOptions]):
    """``targets`` in the order of the head's outputs; k of them. Logits are in scaled units, unless
    the head has the scaling ``folded`` into it.
    """

    name: ClassVar[str] = "regression"
    about: ClassVar[str] = "one number for a text, or several"
    metric: ClassVar[str] = "r2"
    metrics: ClassVar[tuple[str, ...]] = ("rmse", "pearson", "spearman")
    gives: ClassVar[tuple[str, ...]] = ("truth", "predicted")
    kind: ClassVar[str] = "number"
    learns: ClassVar[str] = "targets"
    suits: ClassVar[tuple[str, ...]] = (NUMBERS,)
    stock: ClassVar[Stock] = Stock(problem="regression")
    Options: ClassVar[type[RegressionOptions]] = RegressionOptions

    columns_named: tuple[str, ...] = ("target",)
    max_length: int = 128
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    folded: bool = field(default=False, metadata=SAID_WHERE_SET)

    @classmethod
    def of(cls, data: RegressionOptions) -> Self:
        """As in Task; without a center and a scale, which a run always has, targets stay as they
        are.
        """
        count = len(data.targets)
        return cls(
            columns_named=data.targets,
            max_length=data.max_length,
            center=data.center or (0.0,) * count,
            scale=data.scale or (1.0,) * count,
        )

    @property
    def output_names(self) -> tuple[str, ...]:
        """As in Task."""
        return self.columns_named

    @property
    def outputs(self) -> int:
        """One for each target."""
        return len(self.columns_named)

    # -------------------------------------------------------------------- rows
    @classmethod
    def columns(cls, data: RegressionOptions) -> list[str]:
        """As in Task."""
        texts = [data.text]
        if data.pair:
            texts.append(data.pair)
        return [*texts, *data.targets]

    @classmethod
    def answer_columns(cls, data: RegressionOptions) -> list[str]:
        """As in Task."""
        return list(data.targets)

    @classmethod
    def row(
        cls,
        values: Mapping[str, Any],
        data: RegressionOptions,
        place: Place,
    ) -> Row:
        """``{"text": str, "targets": [float, ...], "label": ""}``: there is no label to split by."""
        texts = cls.texts(values, data, place)
        found = [_number(values[name], name, place) for name in data.targets]
        return {**texts, "targets": found, "label": ""}

    @classmethod
    def question(
        cls,
        values: Mapping[str, Any],
        data: RegressionOptions,
        place: Place,
    ) -> Row:
        """As in Task."""
        return cls.texts(values, data, place)

    @classmethod
    def lacks(cls, data: RegressionOptions) -> tuple[str, str] | None:
        """As in Task."""
        for key in ("center", "scale"):
            if getattr(data, key) is None:
                return key, f"the {key} of the targets"
        return None

    @classmethod
    def settled(cls, data: RegressionOptions, rows: Sequence[Row]) -> dict[str, Any]:
        """Center and scale, where the job leaves them to the rows."""
        values = np.array([row["targets"] for row in rows], dtype=np.float64)
        mean = values.mean(axis=0)
        center = np.array(data.center or mean.tolist())
        variance = ((values - center) ** 2).mean(axis=0)
        scale = np.array(data.scale or np.sqrt(variance).tolist())
        for name, spread in zip(data.targets, scale.tolist(), strict=True):
            if not spread > 0:
                raise DataError(
                    f"the column {name!r} is the same number in all training rows, so there is "
                    "nothing to learn; leave it out of data.targets"
                )
        return {"center": center.tolist(), "scale": scale.tolist()}

    # ---------------------------------------------------------------- examples
    def target(self, row: Row, number: int) -> list[float]:
        """The scaled targets. Raises DataError where they are not as many numbers as the task
        has.
        """
        given = row["targets"]
        if not isinstance(given, list | tuple):
            given = [given]
        if len(given) != self.outputs:
            raise DataError(
                f"row {number} has {len(given)} targets, but the model knows {self.outputs}: "
                f"{', '.join(self.columns_named)}"
            )
        place = f"row {number}"
        numbers = [_number(each, "targets", place) for each in given]
        scaled: list[float] = []
        for each, center, scale in zip(numbers, self.center, self.scale, strict=True):
            scaled.append((each - center) / scale)
        return scaled

    def targets(self, examples: Sequence[Example]) -> Float[Tensor, "b k"]:
        """In scaled units."""
        labels = [example["label"] for example in examples]
        return torch.tensor(labels, dtype=torch.float32)

    # ---------------------------------------------------------------- measures
    def loss(self, logits: Float[Tensor, "b k"], batch: Batch) -> Float[Tensor, ""]:
        """The mean squared error in scaled units."""
        truth = batch["labels"].to(logits.dtype)
        return F.mse_loss(self._scaled(logits), truth)

    def score(self, logits: Float[Tensor, "b k"], batch: Batch) -> dict[str, float]:
        """Of each target, in scaled units, the sums of squared errors, of numbers and of their
        squares; and rows.
        """
        truth = batch["labels"].double()
        off = self._scaled(logits).double() - truth
        missed = off.square().sum(0).tolist()
        sums = truth.sum(0).tolist()
        squares = truth.square().sum(0).tolist()
        found = {"examples": float(len(truth))}
        for number in range(self.outputs):
            found[f"missed {number}"] = missed[number]
            found[f"sum {number}"] = sums[number]
            found[f"squares {number}"] = squares[number]
        return found

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The mean squared error in scaled units, and the share of the variance that is explained
        (0 where there is none), each the mean over targets.
        """
        count = sums["examples"]
        explained: list[float] = []
        for number in range(self.outputs):
            total = sums[f"sum {number}"]
            spread = sums[f"squares {number}"] - total**2 / count
            share = 0.0
            if spread > 0:
                share = 1 - sums[f"missed {number}"] / spread
            explained.append(share)
        missed = sum(sums[f"missed {number}"] for number in range(self.outputs))
        return {
            "loss": missed / count / self.outputs,
            "r2": sum(explained) / self.outputs,
            "examples": count,
        }

    def compared(self, found: Float[Tensor, "n k"], examples: Sequence[Example]) -> Answers:
        """Numbers in true units."""
        labels = [example["label"] for example in examples]
        truth = self._in_true_units(torch.tensor(labels, dtype=torch.float64))
        predicted = self._true(found.double())
        return Answers(
            labels=self.columns_named,
            truth=truth.numpy(),
            predicted=predicted.numpy(),
        )

    def probabilities(self, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """There are none."""
        raise DataError("a number has no probability; ask for predict or logits")

    def told(self, logits: Float[Tensor, "n k"]) -> list[float] | list[dict[str, float]]:
        """In true units: a number, or one for each target by its name."""
        rows = self._true(logits.double()).tolist()
        if self.outputs == 1:
            return [row[0] for row in rows]
        return [dict(zip(self.columns_named, row, strict=True)) for row in rows]

    # ------------------------------------------------------------------ scaling
    def check_head(self, head: Mapping[str, Tensor]) -> None:
        """A head without a bias [k] cannot have a center folded into it."""
        if any(self.center) and _last(head)[1] is None:
            raise JobError(
                f"data.center = {shown(list(self.center))} needs a head with a bias, which this "
                f"model's own has not; set data.center = {shown([0.0] * self.outputs)}, or "
                'model.head = "pooled".'
            )

    def leaving(self, head: Mapping[str, Tensor]) -> tuple[Regression, dict[str, Tensor]]:
        """With the scaling folded into the head's last layer, its weight [k, h] and bias [k]."""
        weight, bias = _last(head)
        found = dict(head)
        scale = torch.tensor(self.scale, dtype=head[weight].dtype)
        found[weight] = head[weight] * scale[:, None]
        if bias is not None:
            center = torch.tensor(self.center, dtype=head[bias].dtype)
            found[bias] = head[bias] * scale + center
        return replace(self, folded=True), found

    def _scaled(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """What a head gives, in scaled units."""
        if not self.folded:
            return logits
        center = logits.new_tensor(self.center)
        scale = logits.new_tensor(self.scale)
        return (logits - center) / scale

    def _true(self, logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """What a head gives, in true units."""
        if self.folded:
            return logits
        return self._in_true_units(logits)

    def _in_true_units(self, scaled: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        center = scaled.new_tensor(self.center)
        scale = scaled.new_tensor(self.scale)
        return scaled * scale + center


def _number(
    value: Any,
    column: str,
    place: Place,
) -> float:
    """A finite number, or the text of one. Raises DataError."""
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{place}: the column {column!r} is {value!r}, not a finite number; correct or remove "
            "the row"
        )
    return number


def _last(head: Mapping[str, Tensor]) -> tuple[str, str | None]:
    """The weight [k, h] of a head's last layer, and its bias [k], by name."""
    weight = [name for name, value in head.items() if value.ndim == 2][-1]
    bias = weight.removesuffix("weight") + "bias"
    if bias in head:
        return weight, bias
    return weight, None
