"""What recycling leaves: a PEFT adapter, a head of class means where a few images were given, and the
images, so that owners see what their adapters give away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.federation.tasks.base import Example
from fedgrove.ground.errors import AdapterError, DataError
from fedgrove.ground.files import write_json
from fedgrove.ground.names import folder_of
from fedgrove.interop import peft
from fedgrove.pools.pool import Pool, refuse_used
from fedgrove.pools.recycle import META, Recycled
from fedgrove.use.prototypes import prototype_head

IMAGES, ABOUT = "inverted", "recycled.json"
_SHOWN = 4  # images of a class that are kept as files


def labelled(folder: Path) -> list[tuple[Path, str]]:
    """The images of ``folder/LABEL/*`` with their labels. Raises ``DataError`` where there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; name a folder with a folder of images per label")
    found = [(path, path.parent.name) for path in sorted(folder.glob("*/[!.]*")) if path.is_file()]
    if not found:
        raise DataError(f"{folder} has no images; put them into a folder for each label")
    return found


def refuse_stock(pool: Pool) -> None:
    """Raises ``AdapterError`` for members with the base's own classifier."""
    if pool.kernel.base.head != "pooled":
        raise AdapterError(
            "Recycling tells classes by the mean of the last states, and the members read them with the "
            "base's own classifier; train them with model.head = pooled."
        )


def images_of(pool: Pool, paths: Sequence[Path]) -> list[Example]:
    """Images as the model reads them, without labels."""
    rows = [{"image": str(path)} for path in paths]
    return pool.kernel.task.encode(rows, pool.kernel.base.processor)


def write(
    pool: Pool,
    made: Recycled,
    out: Path,
    shots: Sequence[tuple[Path, str]] = (),
) -> Path:
    """Write the directory, whole or not at all; with ``shots`` its head knows their labels."""
    refuse_used(out)
    base = pool.kernel.base
    labels: list[str] = []
    head: dict[str, Tensor] = {}
    if shots:
        labels = sorted({label for _, label in shots})
        examples = images_of(pool, [path for path, _ in shots])
        theta = Assembly((Term(META, made.adapter, train=""),))
        numbers = [labels.index(label) for _, label in shots]
        head = prototype_head(pool.kernel.features(examples, theta), numbers, labels)
    out.parent.mkdir(parents=True, exist_ok=True)
    peft.save_adapter(
        out,
        made.adapter,
        base=base.upstream,
        head=head,
        head_kind="pooled",
        card={**pool.card, "labels": labels, "method": None, "client": None},
    )
    write_json(
        out / ABOUT,
        {
            "members": {
                name: {"images": len(each.examples), "first": each.first, "best": each.best}
                for name, each in made.images.items()
            },
            "losses": made.losses,
        },
    )
    _keep_images(pool, made, out)
    return out


def _keep_images(
    pool: Pool,
    made: Recycled,
    out: Path,
) -> None:
    from PIL import Image

    for name, inverted in made.images.items():
        for number, label in enumerate(pool.card["labels"]):
            own = [each for each in inverted.examples if each["label"] == number]
            for index, each in enumerate(own[:_SHOWN]):
                folder = out / IMAGES / folder_of(name)
                folder.mkdir(parents=True, exist_ok=True)
                pixels = each["pixels"].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / f"{folder_of(label)}-{index}.png")
