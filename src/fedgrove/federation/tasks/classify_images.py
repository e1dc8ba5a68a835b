"""Image classification: pixels by the model's own image processor, mean cross-entropy, accuracy,
and a linear head on the mean of the last hidden states (all of them, [CLS] included)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.federation.images import Picture, picture_of
from fedgrove.federation.readers import Place, Row
from fedgrove.federation.tasks.base import Batch, Example
from fedgrove.federation.tasks.classifier import Classifier, class_of
from fedgrove.ground.errors import DataError

if TYPE_CHECKING:
    from fedgrove.job.sections import DataSection

CHUNK = 64  # images decoded at a time: their full-size pixels are the largest thing in memory


@dataclass(frozen=True)
class Scaling:
    """What the processor does to 8-bit pixels after resizing: ``(pixel * factor - mean) / std`` by
    channel.
    """

    factor: float
    mean: Tensor  # [c, 1, 1]
    std: Tensor

    @classmethod
    def of(cls, processor: Any) -> Scaling:
        """As the processor's own settings say."""
        factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0
        if not getattr(processor, "do_normalize", False):
            return cls(factor, torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (processor.image_mean, processor.image_std)
        )
        return cls(factor, mean, std)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() * self.factor - self.mean) / self.std


@dataclass(frozen=True)
class ClassifyImages(Classifier):
    """``labels`` in the order of the head's outputs."""

    labels: tuple[str, ...]
    name: str = "classify-images"
    classifies: ClassVar[bool] = True
    asks: ClassVar[str] = "image"
    metric: str = "accuracy"

    @classmethod
    def of(cls, data: DataSection) -> ClassifyImages:
        """As in Task."""
        return cls(labels=tuple(data.labels or ()))

    def card(self) -> dict[str, Any]:
        """As in Task."""
        return {"task": self.name, "labels": list(self.labels)}

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> ClassifyImages:
        """As in Task."""
        return cls(labels=tuple(card["labels"]))

    @staticmethod
    def columns(data: DataSection) -> list[str]:
        """As in Task."""
        return [data.image, data.label]

    @staticmethod
    def row(values: Mapping[str, Any], data: DataSection, place: Place) -> Row:
        """``{"image": Picture, "label": str}``."""
        return {
            "image": picture_of(values[data.image], data.image, place),
            "label": class_of(values[data.label], data, place),
        }

    @staticmethod
    def describe(rows: Sequence[Row]) -> dict[str, Any]:
        """The median of the longer sides, in pixels."""
        return {
            "median_pixels": median(max(row["image"].width, row["image"].height) for row in rows)
        }

    def encode(self, rows: Sequence[Row], processor: Any) -> list[Example]:
        """``{"pixels": uint8 [c, h, w], "scaling": Scaling, "label": int}``: resized and cropped,
        not yet scaled.

        A row's image is a Picture, a path, or anything else that ``picture_of`` takes. Scaled
        pixels would take four times the memory. Raises DataError for a label that the task does not
        have, and for an image that cannot be opened.
        """
        numbers = {label: number for number, label in enumerate(self.labels)}
        scaling = Scaling.of(processor)
        examples: list[Example] = []
        for start in range(0, len(rows), CHUNK):
            chosen = rows[start : start + CHUNK]
            opened = [
                _picture(row["image"], start + number).rgb()
                for number, row in enumerate(chosen, start=1)
            ]
            pixels = processor(
                images=opened, do_rescale=False, do_normalize=False, return_tensors="np"
            )["pixel_values"]
            for number, (row, each) in enumerate(zip(chosen, pixels, strict=True), start=start + 1):
                # a processor that makes anything but 8-bit pixels is held in half precision
                values = each if each.dtype == np.uint8 else each.astype(np.float16)
                example: Example = {"pixels": torch.from_numpy(values.copy()), "scaling": scaling}
                if "label" in row:
                    if row["label"] not in numbers:
                        known = ", ".join(map(repr, self.labels))
                        raise DataError(
                            f"row {number} has the label {row['label']!r}, but the model knows "
                            f"only: {known}"
                        )
                    example["label"] = numbers[row["label"]]
                examples.append(example)
        return examples

    def lengths(self, rows: Sequence[Row], processor: Any) -> list[int]:
        """As in Task."""
        return []

    def truncated(self, rows: Sequence[Row], processor: Any) -> int:
        """None: images are resized, not cut."""
        return 0

    def length(self, example: Example) -> int:
        """All alike."""
        return 0

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """pixel_values [b, c, h, w] in float32, as the processor would give them."""
        pixels = torch.stack([example["pixels"] for example in examples])
        batch = {"pixel_values": examples[0]["scaling"](pixels)}
        if all("label" in example for example in examples):
            batch["labels"] = torch.tensor(
                [example["label"] for example in examples], dtype=torch.long
            )
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As in Task."""
        return {"pixel_values": batch["pixel_values"]}

    def pool(self, hidden_states: Float[Tensor, "b t h"], batch: Batch) -> Float[Tensor, "b h"]:
        """The mean of all states, summed in at least float32."""
        return hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32)).mean(1)


def _picture(image: Any, number: int) -> Picture:
    if isinstance(image, Picture):
        return image
    return picture_of(Path(image) if isinstance(image, str) else image, "image", f"row {number}")
