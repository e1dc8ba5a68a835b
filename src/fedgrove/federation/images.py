"""Images out of files, bytes and folders: looked at once, kept small, opened as RGB. Every error
names the image.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgrove.federation.purposes import purposes_of
from fedgrove.federation.readers import Place
from fedgrove.ground.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

#: what file browsers and archives put beside images
LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx", "@eadir")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that can be opened: its file's bytes, or where the file lies. ``str`` is its
    SHA-256, for fingerprints.

    Pixels are not kept: a federation of many large photos fits in memory.
    """

    content: bytes | Path
    sha256: str
    width: int
    height: int

    def __str__(self) -> str:
        return f"image {self.sha256}"

    __repr__ = __str__

    def rgb(self) -> Image:
        """The image, 8 bits of red, green and blue. Raises DataError where the file has changed
        since it was read.
        """
        if isinstance(self.content, bytes):
            return opened(self.content, str(self))
        content, place = _read(self.content), str(self.content)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(f"{place} has changed while it was in use; start again")
        return opened(content, place)


def picture_of(
    value: Any,
    column: str,
    place: Place,
) -> Picture:
    """``value`` as an image: a path, a file's bytes, ``{"bytes": ...}`` or ``{"path": ...}`` as
    data sets store them, or a PIL image. It is decoded once, so that a broken one is found before
    anything is trained.

    Raises DataError with its place.
    """
    kept: bytes | Path
    if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
        value = value.get("bytes") or Path(value["path"])
        if isinstance(value, Path) and not value.is_file():
            raise DataError(
                f"{place}: the column {column!r} names the file {str(value)!r}, which is not "
                f"there; store the bytes of "
                "the images in the table"
            )
    if isinstance(value, Path):
        kept, content, place = value, _read(value), str(value)
    elif isinstance(value, bytes | bytearray | memoryview):
        kept = content = bytes(value)
    elif hasattr(value, "save") and hasattr(value, "mode"):
        kept = content = _png(value, place)
    else:
        what = "is empty" if value is None else f"holds a {type(value).__name__}, not an image"
        raise DataError(
            f"{place}: the column {column!r} {what}; give the bytes of image files, or a folder of "
            f"images"
        )
    image = opened(content, place)
    return Picture(
        kept,
        hashlib.sha256(content).hexdigest(),
        image.width,
        image.height,
    )


def _png(image: Image, place: Place) -> bytes:
    """A PIL image as a file: RGB, because PNG has no CMYK, Lab or HSV."""
    from PIL import ImageOps

    out = io.BytesIO()
    try:
        _rgb(ImageOps.exif_transpose(image), place).save(out, "PNG")
    except DataError:
        raise
    except Exception as error:  # lazily read from a broken file, or of a mode that does not convert
        raise DataError(
            f"{place} is not a readable image ({' '.join(str(error).split())}); repair it"
        ) from error
    return out.getvalue()


def opened(content: bytes, place: Place) -> Image:
    """The decoded image as 8-bit RGB, the right way up; transparency lies on white, 16-bit grey is
    scaled to 8 bits.

    Raises DataError for what is no image, is damaged, or is too large to be one.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content))
            image.load()
            return _rgb(ImageOps.exif_transpose(image), place)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{place} is too large an image ({error}); make it smaller".replace("\n", " ")
        ) from error
    except DataError:
        raise
    except Exception as error:  # each of Pillow's formats has errors of its own
        why = (
            " ".join(str(error).split()) if "BytesIO" not in str(error) else "no known image format"
        )
        raise DataError(f"{place} is not a readable image ({why}); repair or remove it") from error


def _rgb(image: Image, place: Place) -> Image:
    from PIL import Image as library

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"{place} has grey values beyond 0 to 65535; convert it to 8 bits")
        if isinstance(clear := image.info.get("transparency"), int):
            grey = np.where(grey == clear, 65535, grey)
        return library.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(
            f"{place} has floating-point pixels, whose range is unknown; convert it to 8 bits"
        )
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = library.new("RGBA", layer.size, (255, 255, 255, 255))
        return library.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not an ordinary file; name an image, or move it away")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


# ------------------------------------------------------------------ folders
def labelled(folder: Path, source: str = "") -> Iterator[tuple[Place, Path, str]]:
    """Place, file and label of each image in ``folder/label/*.png|jpg|...``, in name order.

    Hidden files, what file browsers leave behind, and notes (``.md``, ``.toml``, ``.txt``) are
    passed over. A label is its folder's name in Unicode's composed form: two file systems may spell
    one "é" differently. Raises DataError for anything else that is no image, for an image outside a
    label's folder, and for a label without images; the job's
    ``source`` helps to say what was meant.
    """
    labels = _entries(folder)
    if not labels:
        raise DataError(
            f"{folder} has no label folders; put its images into one folder for each label"
        )
    for label in labels:
        if not label.is_dir():
            _existing(label)
            raise DataError(
                f"{label} lies outside a label's folder; move it into one, such as "
                f"{folder / 'LABEL'}"
                + f' (if {folder.name!r} is itself a label, set data.source = "table")'
                * (source == "silos")
            )
        found = False
        for path in _entries(label):
            if path.is_dir():
                raise DataError(
                    f"{path} is a folder within the label {label.name!r}; images lie in {label} "
                    f"itself"
                    + f' (if {label.name!r} is a client, set data.source = "silos")'
                    * (source == "table")
                )
            if path.suffix.lower() not in ENDINGS:
                raise DataError(
                    f"{path} is not an image file ({', '.join(ENDINGS)}); convert it or move it "
                    f"away"
                )
            found = True
            yield str(path), path, unicodedata.normalize("NFC", label.name)
        if not found:
            raise DataError(f"{label} has no images; remove the empty label folder or fill it")


def clients(folder: Path) -> list[Path]:
    """The clients' folders of ``folder/client/label/*.png``, in name order. Raises DataError for a
    file among them.
    """
    found = _entries(folder)
    for path in found:
        if not path.is_dir():
            _existing(path)
            raise DataError(
                f"{path} is not a client's folder; images lie in {folder / 'CLIENT' / 'LABEL'}, so "
                f"move it away"
            )
    if not found:
        raise DataError(
            f"the folder of silos {folder} is empty; put one folder per client there, with one per "
            f"label"
        )
    return found


def purposes(folder: Path) -> dict[str, Path]:
    """The folders of ``folder/train/label/*.png`` and ``folder/test/label/*.png``; {} where the
    images are not divided so.
    """
    found = purposes_of(_entries(folder))
    divided = all(any(each.is_dir() for each in _entries(path)) for path in found.values())
    return found if divided else {}


def is_tree(folder: Path) -> bool:
    """Whether a folder of silos holds folders of images, rather than data files."""
    return any(path.is_dir() for path in _entries(folder)) or not _entries(folder)


def tree_fingerprint(folder: Path, pictures: list[Picture]) -> str:
    """SHA-256 over the relative paths and contents of the images."""
    whole = hashlib.sha256()
    for picture in pictures:
        assert isinstance(picture.content, Path)
        whole.update(
            f"{picture.content.relative_to(folder).as_posix()}\0{picture.sha256}\0".encode()
        )
    return whole.hexdigest()


def _existing(path: Path) -> None:
    """A link to nothing is what is wrong, not where it lies."""
    if not path.exists():
        raise DataError(f"{path} is a link that leads nowhere; repair or remove it")


def _entries(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
    for path in found:
        if any(
            "\udc80" <= letter <= "\udcff" for letter in path.name
        ):  # how Python holds bytes that are no UTF-8
            raise DataError(f"{folder} has a name that is not UTF-8, {path.name!a}; rename it")
    return [
        path
        for path in found
        if not path.name.startswith(".")
        and path.name.lower() not in LEFT_BEHIND
        and not (path.is_file() and path.suffix.lower() in (".md", ".toml", ".txt"))
    ]
