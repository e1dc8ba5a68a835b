"""The embedded images: 10,000 photos, and the 100 Quick, Draw! classes (20 super-classes of five)
the ViT never saw.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.federation.readers import Row

if TYPE_CHECKING:
    from PIL.Image import Image

DRAWN = 28  # pixels on a side of a drawing

SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "sea animals": ("dolphin", "fish", "octopus", "shark", "whale"),
    "insects": ("ant", "bee", "butterfly", "mosquito", "spider"),
    "birds": ("duck", "flamingo", "owl", "parrot", "swan"),
    "hooved animals": ("cow", "horse", "pig", "sheep", "zebra"),
    "wild animals": ("bear", "elephant", "kangaroo", "lion", "monkey"),
    "fruit": ("apple", "banana", "grapes", "pear", "pineapple"),
    "vegetables": ("asparagus", "broccoli", "carrot", "mushroom", "onion"),
    "snacks": ("donut", "hamburger", "hot dog", "pizza", "sandwich"),
    "sweets": ("birthday cake", "cookie", "ice cream", "lollipop", "popsicle"),
    "instruments": ("cello", "guitar", "harp", "saxophone", "trumpet"),
    "tools": ("axe", "hammer", "saw", "screwdriver", "shovel"),
    "kitchen": ("fork", "frying pan", "knife", "spoon", "teapot"),
    "clothes": ("jacket", "pants", "sock", "sweater", "t-shirt"),
    "furniture": ("bed", "bench", "chair", "couch", "table"),
    "road vehicles": ("bicycle", "bus", "car", "tractor", "truck"),
    "air and water vehicles": ("airplane", "canoe", "helicopter", "sailboat", "submarine"),
    "buildings": ("barn", "castle", "church", "house", "lighthouse"),
    "appliances": ("laptop", "microwave", "telephone", "television", "toaster"),
    "body parts": ("ear", "eye", "foot", "hand", "nose"),
    "plants": ("cactus", "flower", "leaf", "palm tree", "tree"),
}

SUPERCLASS_OF: dict[str, str] = {
    name: group for group, names in SUPERCLASSES.items() for name in names
}


def drawing(ink: Sequence[float]) -> Image:
    """A drawing's 28 × 28 values of ink in 0..1, row by row, as a grey picture: dark lines on
    white.
    """
    from PIL import Image

    picture = Image.new("L", (DRAWN, DRAWN))
    picture.putdata([round(255 * (1 - value)) for value in ink])
    return picture


def quickdraw(folder: Path) -> list[Row]:
    """The held-back classes as ``{"image": PNG, "label", "superclass"}``, 100 drawings each, in
    order of the classes.

    A drawing that occurs again is dropped, so that none stands on both sides of a split.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for label in sorted(SUPERCLASS_OF):
        with gzip.open(folder / f"{label}.ndjson.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                if line.strip() and line not in seen:
                    seen.add(line)
                    out = io.BytesIO()
                    drawing(json.loads(line)).save(out, "PNG")
                    rows.append(
                        {
                            "image": out.getvalue(),
                            "label": label,
                            "superclass": SUPERCLASS_OF[label],
                        }
                    )
    return rows


#: the photos' classes that are vehicles; the others are animals
VEHICLES = ("airplane", "automobile", "ship", "truck")


def photos(folder: Path) -> list[Row]:
    """CIFAR-10's test photos as ``{"image": PNG, "label", "superclass"}``, 1,000 of each class."""
    examples = json.loads((folder / "photos.json").read_text(encoding="utf-8"))["examples"]
    labels = [
        max(example["target_scores"], key=example["target_scores"].get) for example in examples
    ]
    return [
        {
            "image": base64.b64decode(example["input"]),
            "label": label,
            "superclass": "vehicles" if label in VEHICLES else "animals",
        }
        for example, label in zip(examples, labels, strict=True)
    ]
