"""Image classification: pixels by the model's own image processor, mean cross-entropy, accuracy,
and a linear head on the mean of the last hidden states (all of them, [CLS] included)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedgrove.federation.images import Picture, labelled, picture_of, purposes
from fedgrove.federation.purposes import marked
from fedgrove.federation.readers import Found, Place, Row
from fedgrove.federation.tasks.base import SAID_WHERE_SET, Batch, Example, HeadedTask, Stock
from fedgrove.federation.tasks.classifier import Classifier, ClassOptions, class_of
from fedgrove.ground.options import Column

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
        """[b, c, h, w] in float32, of pixels [b, c, h, w] in 8 bits."""
        return (pixels.float() * self.factor - self.mean) / self.std


class ImageOptions(ClassOptions):
    """The keys of image classification."""

    image: Column = Field("image", description="Column of the image, the bytes of its file.")


@dataclass(frozen=True)
class ClassifyImages(Classifier, HeadedTask[ImageOptions]):
    """``labels`` in the order of the head's outputs."""

    name: ClassVar[str] = "classify-images"
    about: ClassVar[str] = "the class of an image"
    Options: ClassVar[type[ImageOptions]] = ImageOptions
    asks: ClassVar[str] = "image"
    reads: ClassVar[Literal["text", "images"]] = "images"
    folders: ClassVar[bool] = True
    # with a task_type PEFT hands on a text's arguments, which not every image model takes
    stock: ClassVar[Stock] = Stock("AutoModelForImageClassification", None)

    labels: tuple[str, ...]
    class_weights: str | dict[str, float] = field(default="none", metadata=SAID_WHERE_SET)
    ordinal: bool = field(default=False, metadata=SAID_WHERE_SET)

    @classmethod
    def columns(cls, data: ImageOptions) -> list[str]:
        """As in Task."""
        return [data.image, data.label]

    @classmethod
    def row(
        cls,
        values: Mapping[str, Any],
        data: ImageOptions,
        place: Place,
    ) -> Row:
        """``{"image": Picture, "label": str}``."""
        return {
            "image": picture_of(values[data.image], data.image, place),
            "label": class_of(values[data.label], data, place),
        }

    @classmethod
    def in_folder(
        cls,
        folder: Path,
        data: ImageOptions,
        source: str,
    ) -> Found:
        """The images of ``folder/LABEL/*.png``, or of ``folder/train/LABEL/*.png`` and
        ``folder/test/LABEL/*.png``.
        """
        divided = purposes(folder) if folder.is_dir() else {}
        if not divided:
            yield from _labelled(folder, data, source)
        for purpose, part in divided.items():
            yield from marked(_labelled(part, data, source), purpose)

    @classmethod
    def describe(cls, rows: Sequence[Row]) -> dict[str, Any]:
        """The median of the longer sides, in pixels."""
        sides = [max(row["image"].width, row["image"].height) for row in rows]
        return {"median_pixels": median(sides)}

    def encode(self, rows: Sequence[Row], processor: Any) -> list[Example]:
        """``{"pixels": uint8 [c, h, w], "scaling": Scaling, "label": int}``: resized and cropped,
        not yet scaled.

        A row's image is a Picture, a path, or anything else that ``picture_of`` takes. Scaled
        pixels would take four times the memory. Raises DataError for a label that the task does not
        have, and for an image that cannot be opened.
        """
        scaling = Scaling.of(processor)
        examples: list[Example] = []
        for start in range(0, len(rows), CHUNK):
            chosen = rows[start : start + CHUNK]
            opened = [
                _picture(row["image"], number).rgb()
                for number, row in enumerate(chosen, start=start + 1)
            ]
            pixels = processor(
                images=opened,
                do_rescale=False,
                do_normalize=False,
                return_tensors="np",
            )["pixel_values"]
            for number, (row, each) in enumerate(zip(chosen, pixels, strict=True), start=start + 1):
                example: Example = {"pixels": _small(each), "scaling": scaling}
                if self.learns in row:
                    example["label"] = self.target(row, number)
                examples.append(example)
        self.weigh(examples)
        return examples

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """pixel_values [b, c, h, w] in float32, as the processor would give them."""
        pixels = torch.stack([example["pixels"] for example in examples])
        batch = {"pixel_values": examples[0]["scaling"](pixels)}
        if all("label" in example for example in examples):
            batch |= self.label_tensors(examples)
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As in Task: the pixels [b, c, h, w]."""
        return {"pixel_values": batch["pixel_values"]}

    def pool(self, hidden_states: Float[Tensor, "b t h"], batch: Batch) -> Float[Tensor, "b h"]:
        """The mean of all states, summed in at least float32."""
        return hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32)).mean(1)


def _labelled(
    folder: Path,
    data: ImageOptions,
    source: str,
) -> Found:
    for place, path, label in labelled(folder, source):
        yield place, {data.image: path, data.label: label}


def _small(pixels: np.ndarray[Any, Any]) -> Tensor:
    """[c, h, w] in 8 bits; what a processor makes of anything but 8-bit pixels in half
    precision.
    """
    values = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float16)
    return torch.from_numpy(values.copy())


def _picture(image: Any, number: int) -> Picture:
    if isinstance(image, Picture):
        return image
    return picture_of(Path(image) if isinstance(image, str) else image, "image", f"row {number}")
