"""The embedded images, from made-up asset files of the same form."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from fedgrove.federation.assets import ASSETS
from fedgrove.federation.drawings import SUPERCLASS_OF, SUPERCLASSES, drawing, photos, quickdraw
from fedgrove.federation.embedded import EMBEDDED


def test_a_hundred_classes_in_twenty_super_classes() -> None:
    assert len(SUPERCLASSES) == 20
    assert {len(names) for names in SUPERCLASSES.values()} == {5}
    assert len(SUPERCLASS_OF) == 100
    assert set(ASSETS["quickdraw"].members) == {f"{name}.ndjson.gz" for name in SUPERCLASS_OF}
    assert {EMBEDDED[name].task for name in ("photos", "quickdraw")} == {"classify-images"}


def test_ink_is_dark_on_white() -> None:
    ink = [0.0] * 784
    ink[28 + 3] = 1.0
    pixels = np.asarray(drawing(ink))
    assert pixels.shape == (28, 28)
    assert (pixels[1, 3], pixels[0, 0]) == (0, 255)


def test_drawings_that_occur_twice_are_dropped(tmp_path: Path) -> None:
    for number, name in enumerate(sorted(SUPERCLASS_OF)):
        lines = [json.dumps([((number + 1) * row % 97) / 96] * 784) for row in range(1, 4)]
        with gzip.open(tmp_path / f"{name}.ndjson.gz", "wt") as out:
            out.write("\n".join([lines[0], *lines]) + "\n")
    rows = quickdraw(tmp_path)
    assert [row["label"] for row in rows[:3]] == ["airplane"] * 3
    assert rows[0]["superclass"] == "air and water vehicles"
    assert len({row["image"] for row in rows}) == len(rows) < 300
    assert Image.open(io.BytesIO(rows[0]["image"])).size == (28, 28)


def test_photos_carry_their_label_and_super_class(tmp_path: Path) -> None:
    content = base64.b64encode(b"png").decode()
    examples = [
        {"input": content, "target_scores": {"cat": 0, "ship": 1}},
        {"input": content, "target_scores": {"cat": 1}},
    ]
    (tmp_path / "photos.json").write_text(json.dumps({"examples": examples}))
    assert photos(tmp_path) == [
        {"image": b"png", "label": "ship", "superclass": "vehicles"},
        {"image": b"png", "label": "cat", "superclass": "animals"},
    ]
