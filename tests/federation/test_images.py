"""Pictures out of bytes, files, folders and tables, and what is said about broken ones."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.federation.conftest import MakeJob
from tests.tiny import picture, save_pictures

from fedgrove.federation import build
from fedgrove.federation.images import Picture, opened, picture_of
from fedgrove.federation.load import rows_of
from fedgrove.ground.errors import DataError, FedgroveError, JobError
from fedgrove.runs.prepare import fingerprint_of

IMAGES = "data.task='classify-images'"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(side: int = 4) -> Image.Image:
    return picture("red", random.Random(0), side)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "silos", images=8)


def silos(make_job: MakeJob, folder: Path, *more: str) -> Any:
    return make_job(IMAGES, "data.source='silos'", f"data.path='{folder}'", *more)


# ------------------------------------------------------------ single pictures
def test_whatever_way_an_image_comes_it_is_the_same(tmp_path: Path) -> None:
    image = plain()
    content = encoded(image)
    (tmp_path / "a.png").write_bytes(content)
    ways = [
        content,
        bytearray(content),
        {"bytes": content, "path": None},
        tmp_path / "a.png",
        image,
    ]
    ways.append({"bytes": None, "path": str(tmp_path / "a.png")})
    for value in ways:
        found = picture_of(value, "image", "here")
        assert np.array_equal(np.asarray(found.rgb()), np.asarray(image)), value
        assert (found.width, found.height) == (4, 4)
    assert len({str(picture_of(value, "image", "here")) for value in ways}) == 1
    assert isinstance(
        picture_of(tmp_path / "a.png", "image", "here").content, Path
    )  # not the bytes: memory


def test_a_picture_reads_as_its_digest() -> None:
    one, other = (picture_of(encoded(plain(side)), "image", "here") for side in (4, 5))
    assert str(one).startswith("image ")
    assert str(one) != str(other)
    assert len(str(one)) == 70


def test_grey_transparent_palette_and_turned_images() -> None:
    grey = Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8))
    assert np.asarray(opened(encoded(grey), "x"))[..., 0].tolist() == [[0, 100], [200, 255]]
    deep = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16))
    assert np.asarray(opened(encoded(deep), "x"))[..., 1].tolist() == [[0, 100], [200, 255]]
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(opened(encoded(clear), "x")).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    palette = plain().convert("P")
    assert opened(encoded(palette, "GIF"), "x").mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    wide = Image.new("RGB", (6, 3), "red")
    assert opened(encoded(wide, "JPEG", exif=exif), "x").size == (3, 6)
    assert opened(encoded(wide.convert("CMYK"), "JPEG"), "x").getpixel((0, 0)) == pytest.approx(
        (254, 0, 0), abs=8
    )
    assert opened(encoded(wide.convert("1")), "x").mode == "RGB"


@pytest.mark.parametrize("mode", ["CMYK", "HSV", "YCbCr", "LA", "P", "1", "I;16"])
def test_a_pil_image_of_any_mode_is_taken(mode: str) -> None:
    """PNG, as which it is kept, has not all of them."""
    red = Image.new("RGB", (6, 3), "red")
    image = (
        Image.fromarray(np.full((3, 6), 257 * 76, np.uint16))
        if mode == "I;16"
        else red.convert(mode)
    )
    assert image.mode == mode
    found = picture_of(image, "image", "row 3").rgb()
    expected = {"LA": (76, 76, 76), "I;16": (76, 76, 76), "1": (0, 0, 0)}.get(mode, (254, 0, 0))
    assert (found.mode, found.size) == ("RGB", (6, 3))
    if mode != "1":  # dithered
        assert found.getpixel((0, 0)) == pytest.approx(expected, abs=3)


def test_a_pil_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(encoded(plain(40))[:300])
    with (
        Image.open(tmp_path / "cut.png") as lazy,
        pytest.raises(DataError, match=r"row 3 is not a readable image \(.*\);"),
    ):
        picture_of(lazy, "image", "row 3")
    with pytest.raises(DataError, match="row 3 has floating-point pixels"):
        picture_of(Image.new("F", (2, 2)), "image", "row 3")


def test_sixteen_bits_of_colour_and_transparent_palettes() -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    pixels = (
        b"\0" + struct.pack(">3H", 257 * 200, 257 * 100, 0) + struct.pack(">3H", 65535, 0, 257 * 50)
    )
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    deep = (
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    )
    assert np.asarray(opened(deep, "x")).tolist() == [[[200, 100, 0], [255, 0, 50]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    clear = encoded(palette, "PNG", transparency=1)
    assert np.asarray(opened(clear, "x")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            {"bytes": None, "path": "away.png"},
            "row 3: the column 'image' names the file 'away.png', which is not there;",
        ),
        (
            None,
            "row 3: the column 'image' is empty; give the bytes of image files, or a folder of "
            "images",
        ),
        ({"bytes": None, "path": None}, "row 3: the column 'image' holds a dict, not an image"),
        ("photo.png", "row 3: the column 'image' holds a str, not an image"),
        (
            b"not an image",
            "row 3 is not a readable image (no known image format); repair or remove it",
        ),
        (encoded(plain(40))[:200], "row 3 is not a readable image (image file is truncated"),
        (encoded(plain(40)).replace(b"IDAT", b"IDAT\x00", 1), "row 3 is not a readable image ("),
        (Path("nowhere.png"), "nowhere.png cannot be read: No such file or directory"),
        (
            encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
            "row 3 has floating-point pixels",
        ),
    ],
)
def test_what_is_no_image_is_named(value: Any, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        picture_of(value, "image", "row 3")
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_file_that_claims_a_billion_pixels_is_refused() -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match="row 3 is too large an image"):
        picture_of(bomb, "image", "row 3")


def test_a_file_that_changes_under_the_run_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(plain()))
    found = picture_of(tmp_path / "a.png", "image", "here")
    (tmp_path / "a.png").write_bytes(encoded(plain(5)))
    with pytest.raises(DataError, match=r"a\.png has changed while it was in use"):
        found.rgb()


# ------------------------------------------------------------ folders
def test_folders_are_clients_and_labels(make_job: MakeJob, folder: Path) -> None:
    (folder / "README.md").write_text("notes")
    (folder / "site-1" / "red" / ".DS_Store").write_bytes(b"x")
    (folder / "site-1" / "red" / "Thumbs.db").write_bytes(b"x")
    plain(31).save(folder / "site-2" / "blue" / "large.jpeg")
    found = build(silos(make_job, folder))
    assert [client.name for client in found.clients] == ["site-0", "site-1", "site-2"]
    assert found.labels == ("blue", "red")
    assert [len(client.train) + len(client.test) for client in found.clients] == [8, 8, 9]
    assert found.table()["clients"][0]["median_pixels"] == 20
    assert all(
        isinstance(row["image"], Picture) for client in found.clients for row in client.train
    )


def test_names_as_file_systems_have_them(make_job: MakeJob, folder: Path, tmp_path: Path) -> None:
    """Capitals, other scripts, "é" in one character or two, links, and what file browsers leave
    behind.
    """
    (folder / "site-0" / "red").rename(folder / "site-0" / "caf\u00e9")
    (folder / "site-1" / "red").rename(folder / "site-1" / "cafe\u0301")
    (folder / "site-2" / "red").rename(tmp_path / "elsewhere")
    (folder / "site-2" / "caf\u00e9").symlink_to(tmp_path / "elsewhere")
    for site in ("site-0", "site-1", "site-2"):
        (folder / site / "blue").rename(folder / site / "синий 青")
        (folder / site / "desktop.ini").write_text("[.ShellClassInfo]")
        (folder / site / "__MACOSX").mkdir()
    one = folder / "site-0" / "синий 青"
    plain(31).save(one / "ФОТО 1.JPeG", "JPEG")
    (one / "linked.PNG").symlink_to(one / "ФОТО 1.JPeG")
    found = build(silos(make_job, folder))
    assert found.labels == ("caf\u00e9", "синий 青")
    assert [len(client.train) + len(client.test) for client in found.clients] == [10, 8, 8]


def test_labels_may_differ_from_client_to_client(make_job: MakeJob, folder: Path) -> None:
    (folder / "site-2" / "red").rename(folder / "site-2" / "green")
    found = build(silos(make_job, folder))
    assert found.labels == ("blue", "green", "red")
    held = {
        client["name"]: [label for label, n in client["labels"].items() if n]
        for client in found.table()["clients"]
    }
    assert held == {
        "site-0": ["blue", "red"],
        "site-1": ["blue", "red"],
        "site-2": ["blue", "green"],
    }
    with pytest.raises(
        DataError,
        match=r"site-2/green/0\.png: the label 'green' is not in data\.labels \('blue', 'red'\)",
    ):
        build(silos(make_job, folder, "data.labels=['blue', 'red']"))
    with pytest.raises(
        DataError, match=r"the label 'green' of the client 'site-2' occurs only in .* held-out rows"
    ):
        build(silos(make_job, folder, "federation.held_out=['site-2']"))


def test_the_fingerprint_is_that_of_the_pixels_not_of_the_place(
    make_job: MakeJob, folder: Path, tmp_path: Path
) -> None:
    first = build(silos(make_job, folder))
    folder.rename(tmp_path / "elsewhere")
    second = build(silos(make_job, tmp_path / "elsewhere"))
    assert fingerprint_of(first) == fingerprint_of(second)
    assert first.source["sha256"] == second.source["sha256"]
    place = tmp_path / "elsewhere" / "site-0" / "blue" / "7.png"
    plain(21).save(place)
    third = build(silos(make_job, tmp_path / "elsewhere"))
    assert fingerprint_of(third) != fingerprint_of(first)
    assert third.source["sha256"] != first.source["sha256"]


def broken(folder: Path, what: str) -> None:
    one = folder / "site-0" / "blue"
    match what:
        case "truncated":
            (one / "7.png").write_bytes((one / "7.png").read_bytes()[:300])
        case "text":
            (one / "7.png").write_text("this is a text")
        case "other":
            (one / "table.csv").write_text("a,b")
        case "nested":
            (one / "deeper").mkdir()
        case "stray":
            plain().save(folder / "site-0" / "stray.png")
        case "empty label":
            (folder / "site-0" / "green").mkdir()
        case "empty client":
            (folder / "site-9").mkdir()
        case "file":
            plain().save(folder / "photo.png")
        case "name":
            (folder / "site-0").rename(folder / "site  0")
        case "twice":
            (folder / "site-0").rename(folder / "Site-1")
        case "letters":
            (folder / "site-0").rename(folder / "Zürich; Nord")
        case "dead image":
            (one / "dead.png").symlink_to(folder / "nowhere.png")
        case "dead label":
            (folder / "site-0" / "dead").symlink_to(folder / "nowhere")
        case "dead client":
            (folder / "dead").symlink_to(folder / "nowhere")
        case "loop":
            (one / "loop.png").symlink_to(one / "loop.png")
        case "bytes":
            Path(os.fsdecode(os.fsencode(one) + b"/\xff.png")).write_bytes(
                (one / "7.png").read_bytes()
            )
        case "flat":
            for path in sorted(one.iterdir()):
                path.rename(folder / "site-0" / path.name)
            one.rmdir()
        case "heic":
            (one / "7.png").rename(one / "7.heic")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("truncated", r"blue/7\.png is not a readable image \(.*\); repair or remove it"),
        (
            "text",
            r"blue/7\.png is not a readable image \(no known image format\); repair or remove it",
        ),
        (
            "other",
            r"blue/table\.csv is not an image file \(\.png, .*\); convert it or move it away",
        ),
        ("nested", r"blue/deeper is a folder within the label 'blue'; images lie in .*blue itself"),
        ("stray", r"site-0/stray\.png lies outside a label's folder; move it into one"),
        ("empty label", r"site-0/green has no images; remove the empty label folder or fill it"),
        (
            "empty client",
            r"site-9 has no label folders; put its images into one folder for each label",
        ),
        ("file", r"photo\.png is not a client's folder; images lie in .*, so move it away"),
        ("name", r"site  0 cannot name a client: use at most 64 letters"),
        (
            "twice",
            r"Site-1 and .*site-1 name the same client 'site-1'; rename or merge one of them",
        ),
        (
            "letters",
            r"Zürich; Nord cannot name a client: use at most 64 letters, digits, single spaces",
        ),
        ("dead image", r"blue/dead\.png cannot be read: No such file or directory"),
        ("dead label", r"site-0/dead is a link that leads nowhere; repair or remove it"),
        ("dead client", r"silos/dead is a link that leads nowhere; repair or remove it"),
        ("loop", r"blue/loop\.png cannot be read: Too many levels of symbolic links"),
        ("bytes", r"blue has a name that is not UTF-8, '\\udcff\.png'; rename it"),
        (
            "flat",
            r"site-0/\d\.png lies outside a label's folder; .* \(if 'site-0' is itself a label, set data\.source",
        ),
        ("heic", r"blue/7\.heic is not an image file \(\.png, .*\); convert it or move it away"),
    ],
)
def test_broken_folders_are_named_in_one_sentence(
    make_job: MakeJob, folder: Path, what: str, sentence: str
) -> None:
    broken(folder, what)
    with pytest.raises(DataError, match=sentence) as caught:
        build(silos(make_job, folder))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_and_a_task_not_named(
    make_job: MakeJob, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"the folder of silos .* is empty; put one folder per client there"
    ):
        build(silos(make_job, tmp_path / "empty"))
    with pytest.raises(DataError, match=r'folders of images need data\.task = "classify-images"'):
        build(make_job("data.source='silos'", f"data.path='{folder}'"))
    with pytest.raises(JobError, match=r"'domain' needs a table with that column"):
        build(silos(make_job, folder, "data.group='domain'"))


def test_one_folder_of_labels_is_a_table(make_job: MakeJob, folder: Path) -> None:
    job = make_job(
        IMAGES,
        "data.source='table'",
        f"data.path='{folder / 'site-1'}'",
        "federation.clients=2",
        "data.partition.by='iid'",
    )
    found = build(job)
    assert [client.name for client in found.clients] == ["client-00", "client-01"]
    assert sum(len(client.train) + len(client.test) for client in found.clients) == 8
    assert len(rows_of(folder / "site-2", job)) == 8
    with pytest.raises(
        DataError,
        match=r"blue is a folder within the label 'site-0'; .* \(if 'site-0' is a client, set data\.source = \"silos\"",
    ):
        build(job.override([f"data.path='{folder}'"]))
    with pytest.raises(JobError, match="'superclass' needs a table with that column"):
        build(job.override(["data.partition.by='sc-dirichlet'"]))


# ------------------------------------------------------------ tables
def test_parquet_with_bytes_or_as_data_sets_write_it(make_job: MakeJob, tmp_path: Path) -> None:
    import datasets

    draw = random.Random(0)
    labels = ["red", "blue"] * 6
    content = [encoded(picture(label, draw)) for label in labels]
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("string")})
    structs = [{"bytes": each, "path": None} for each in content]
    (tmp_path / "silos").mkdir()
    datasets.Dataset.from_dict({"photo": structs, "kind": labels}, features).to_parquet(
        tmp_path / "silos" / "a.parquet"
    )
    datasets.Dataset.from_dict({"photo": content, "kind": labels}).to_parquet(
        tmp_path / "silos" / "b.parquet"
    )
    job = silos(make_job, tmp_path / "silos", "data.image='photo'", "data.label='kind'")
    found = build(job)
    a, b = found.clients
    assert {str(row["image"]) for row in (*a.train, *a.test)} == {
        str(row["image"]) for row in (*b.train, *b.test)
    }
    rows = datasets.Dataset.from_dict({"photo": [*content[:3], b"broken"], "kind": labels[:4]})
    rows.to_parquet(tmp_path / "silos" / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet, row 4 is not a readable image"):
        build(job)
    with pytest.raises(DataError, match=r"has no column 'image'; it has: photo, kind"):
        build(silos(make_job, tmp_path / "silos", "data.label='kind'"))


def test_a_hub_data_set_gives_its_bytes(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    draw = random.Random(0)
    labels = [0, 1] * 10
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=["red", "blue"]),
            "coarse": datasets.Value("int64"),
        }
    )
    columns = {
        "img": [picture("red", draw) for _ in labels],
        "fine": labels,
        "coarse": [n // 5 for n in range(20)],
    }
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: made)
    job = make_job(
        IMAGES,
        "data.source='hub'",
        "data.name='someone/pictures'",
        "data.image='img'",
        "data.label='fine'",
        "data.partition.by='sc-dirichlet'",
        "data.partition.options={alpha=1.0, partition_by='coarse', min_partition_size=2}",
        "federation.clients=2",
    )
    found = build(job)
    assert found.labels == ("blue", "red")
    kept = found.clients[0].train[0]["image"]
    assert isinstance(kept.content, bytes)  # the file, not its pixels
    assert kept.rgb().size == (20, 20)


def test_sc_dirichlet_is_a_dirichlet_over_super_classes(make_job: MakeJob, tmp_path: Path) -> None:
    """Each super-class is split by one draw, so its classes share the same proportions."""
    import datasets

    content = encoded(plain())
    rows = [(f"{group}{n}", group) for group in "AB" for n in range(3) for _ in range(200)]
    table = {
        "image": [content] * 1200,
        "label": [row[0] for row in rows],
        "superclass": [row[1] for row in rows],
    }
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "t.parquet")
    settings = [
        IMAGES,
        "data.source='table'",
        f"data.path='{tmp_path / 't.parquet'}'",
        "federation.clients=4",
    ]
    skewed = build(
        make_job(
            *settings, "data.partition.by='sc-dirichlet'", "data.partition.options={alpha=0.1}"
        )
    )

    def spread(found: Any) -> tuple[float, float]:
        """Largest difference of proportions between classes of one super-class, and between
        super-classes.
        """
        counts = np.array(
            [
                [
                    sum(row["label"] == label for row in (*client.train, *client.test))
                    for label in found.labels
                ]
                for client in found.clients
            ]
        )
        shares = (counts / counts.sum(0)).reshape(len(found.clients), 2, 3)
        return float(np.ptp(shares, axis=2).max()), float(np.ptp(shares.mean(2), axis=1).max())

    within, between = spread(skewed)
    assert within < 0.12 < 0.3 < between
    even = build(
        make_job(
            *settings, "data.partition.by='sc-dirichlet'", "data.partition.options={alpha=1000.0}"
        )
    )
    assert spread(even)[1] < 0.1


def test_a_key_of_another_task_is_a_mistake(make_job: MakeJob) -> None:
    with pytest.raises(
        FedgroveError, match=r"data\.text = .* has no use with data\.task = \"classify-images\""
    ):
        make_job(IMAGES, "data.text='words'")
    with pytest.raises(
        FedgroveError, match=r"data\.image = .* has no use with data\.task = \"classify-text\""
    ):
        make_job("data.task='classify-text'", "data.image='photo'")


def test_a_transparent_colour_lies_on_white() -> None:
    red = Image.new("RGB", (2, 1), (255, 0, 0))
    red.putpixel((1, 0), (0, 0, 9))
    keyed = opened(encoded(red, transparency=(0, 0, 9)), "here")
    assert [keyed.getpixel((0, 0)), keyed.getpixel((1, 0))] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_waited_for(make_job: MakeJob, folder: Path) -> None:
    label = next(
        path for path in sorted(folder.rglob("*")) if path.is_dir() and any(path.glob("*.png"))
    )
    os.mkfifo(label / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png is not an ordinary file"):
        build(silos(make_job, folder))
