"""A twin of DomainNet from what packages carry: six classes that the photos and the drawings share,
in six domains.

Photos as they are, inverted, as edges, and turned by a quarter; drawings as they are (dark on
white) and inverted. Classes are the same everywhere, looks are not; no photo and no drawing is in
two domains. Pictures go into ``folder/silos/DOMAIN-N/LABEL/*.png``.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from fedgrove.federation.assets import asset
from fedgrove.federation.drawings import photos, quickdraw
from fedgrove.federation.readers import Row
from fedgrove.ground.seeds import numpy_rng

Look = Callable[[Image.Image], Image.Image]

#: class -> what the photos and the drawings call it
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "airplane": ("airplane", ("airplane",)),
    "bird": ("bird", ("duck", "owl", "parrot", "swan")),
    "car": ("automobile", ("car",)),
    "horse": ("horse", ("horse",)),
    "ship": ("ship", ("sailboat",)),
    "truck": ("truck", ("truck",)),
}
LOOKS: dict[str, tuple[str, Look]] = {
    "photo": ("photos", lambda picture: picture),
    "negative": ("photos", ImageOps.invert),
    "edges": ("photos", lambda picture: picture.convert("L").filter(ImageFilter.FIND_EDGES)),
    "turned": ("photos", lambda picture: picture.transpose(Image.Transpose.ROTATE_90)),
    "drawing": ("drawings", lambda picture: picture),
    "chalk": ("drawings", ImageOps.invert),
}
MEMBERS = 2  # clients of each domain
EACH = 20  # pictures of each class and client


def make(folder: Path, seed: int) -> None:
    """The pictures of all clients."""
    kept = {
        "photos": _by_class(photos(asset("photos")), 0),
        "drawings": _by_class(quickdraw(asset("quickdraw")), 1),
    }
    for label in CLASSES:
        for source, rows in kept.items():
            order = numpy_rng(seed, "domains", source, label).permutation(len(rows[label]))
            left = [rows[label][index] for index in order]
            for domain, (origin, look) in LOOKS.items():
                if origin != source:
                    continue
                for member in range(MEMBERS):
                    mine, left = left[:EACH], left[EACH:]
                    _save(folder / "silos" / f"{domain}-{member}" / label, mine, look)


def _by_class(rows: list[Row], which: int) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {label: [] for label in CLASSES}
    for label, names in CLASSES.items():
        known = names[which]
        wanted = (known,) if isinstance(known, str) else known
        found[label] = [row for row in rows if row["label"] in wanted]
    return found


def _save(folder: Path, rows: list[Row], look: Look) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        picture = Image.open(io.BytesIO(row["image"])).convert("RGB")
        look(picture).save(folder / f"{number}.png")
