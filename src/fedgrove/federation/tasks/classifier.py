"""What every classification shares: a linear head on pooled states, mean cross-entropy and
accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.readers import Place, label_of
from fedgrove.federation.tasks.base import Batch
from fedgrove.ground.errors import DataError

if TYPE_CHECKING:
    from fedgrove.job.sections import DataSection


class Classifier:
    """The part of a Task that looks at logits and labels alone; ``labels`` in the order of the
    head's outputs.
    """

    labels: tuple[str, ...]
    heads: ClassVar[tuple[str, ...]] = ("pooled", "stock")
    level: ClassVar[Literal["example", "token"]] = "example"

    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """weight [classes, hidden] from N(0, 0.02²), bias [classes] of zeros."""
        weight = torch.randn(len(self.labels), hidden, generator=generator) * 0.02
        return {"weight": weight, "bias": torch.zeros(len(self.labels))}

    def head_logits(
        self, states: Float[Tensor, "b h"], head: Mapping[str, Tensor]
    ) -> Float[Tensor, "b c"]:
        """As in HeadedTask."""
        return F.linear(states.to(head["weight"].dtype), head["weight"], head["bias"])

    def loss(self, logits: Float[Tensor, "b c"], batch: Batch) -> Float[Tensor, ""]:
        """As in Task."""
        return F.cross_entropy(logits, batch["labels"])

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


def class_of(value: object, data: DataSection, place: Place) -> str:
    """A row's class as a text, one of ``data.labels`` where the job names them. Raises
    DataError.
    """
    label = label_of(value, data.label, place)
    if data.labels and label not in data.labels:
        listed = ", ".join(map(repr, data.labels))
        raise DataError(
            f"{place}: the label {label!r} is not in data.labels ({listed}); add it or correct it"
        )
    return label
