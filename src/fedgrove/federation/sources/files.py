"""One's own files: one table, or a folder with one of them for each client; or folders of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self, TypeVar

from pydantic import Field, model_validator

from fedgrove.federation import images
from fedgrove.federation.purposes import purposes_of, refuse_pairs
from fedgrove.federation.readers import KINDS, READERS, Found, Row, fingerprint
from fedgrove.federation.sources.base import Clients, Origin, Rows, origin
from fedgrove.federation.tables import files_of, passed_over, rows_at
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.names import RULE, client_name
from fedgrove.ground.options import Options, Text


class FileOptions(Options):
    """The keys of files."""

    path: Text | None = Field(
        None,
        description="The folder of silos, or the table; from the working directory. For a file "
        "there may stand a folder with files of the names train and test (and validation).",
        examples=["silos"],
    )
    encoding: Text | None = Field(
        None,
        description="How text files are encoded where no mark at their start says so. Not set: "
        "UTF-8.",
        examples=["cp1252"],
    )


class TableOptions(FileOptions):
    """The keys of one table."""

    @model_validator(mode="after")
    def _table_is_named(self) -> Self:
        return _named(self, "table", "the table's file")


class SilosOptions(FileOptions):
    """The keys of a folder of silos."""

    @model_validator(mode="after")
    def _folder_is_named(self) -> Self:
        return _named(self, "silos", "the folder with one file for each client")


Given = TypeVar("Given", bound=FileOptions)


def _named(
    options: Given,
    source: str,
    what: str,
) -> Given:
    if options.path is None:
        raise ValueError(
            f'data.path is missing: with data.source = "{source}" it must name {what}.'
        )
    return options


def _path(options: FileOptions) -> Path:
    return Path(options.path or "").expanduser()


class TableSource(Rows[TableOptions]):
    """One file of rows, or a folder of images, ``LABEL/*.png``; or of both for training and test."""

    name: ClassVar[str] = "table"
    about: ClassVar[str] = f"one file ({KINDS}), or a folder of images, LABEL/*.png, to be split"
    Options: ClassVar[type[TableOptions]] = TableOptions

    def read(self, columns: Sequence[str]) -> Found:
        """As in Rows."""
        path = _path(self.data)
        if self._in_folders():
            _needs_no_other(self, columns)
            return self.task.in_folder(path, self.data, self.name)
        if not files_of(path):
            raise DataError(
                f"the table {path} does not exist or is a folder; data.path names one file "
                f"({KINDS}), or a folder with a file train and a file test"
            )
        return rows_at(path, columns, self.data.encoding, self.remarks)

    def origin(self, rows: Sequence[Row]) -> Origin:
        """As in Source."""
        path = _path(self.data)
        if self._in_folders():
            sha256 = images.tree_fingerprint(path, [row["image"] for row in rows])
            return origin(path.name, f"the folder {path}", sha256)
        what = "file" if path.is_file() else "folder"
        return origin(path.name, f"the {what} {path}", fingerprint(list(files_of(path).values())))

    def _in_folders(self) -> bool:
        path = _path(self.data)
        return self.task.folders and path.is_dir() and not _are_files(files_of(path))


def _are_files(found: dict[str, Path]) -> bool:
    return bool(found) and all(path.is_file() for path in found.values())


class SilosSource(Clients[SilosOptions]):
    """A folder with one file for each client, or one folder of images, ``CLIENT/LABEL/*.png``."""

    name: ClassVar[str] = "silos"
    about: ClassVar[str] = (
        f"a folder with one file ({KINDS}) for each client, or of images, CLIENT/LABEL/*.png"
    )
    Options: ClassVar[type[SilosOptions]] = SilosOptions

    def read(self, columns: Sequence[str]) -> Iterable[tuple[str, Found]]:
        """As in Clients."""
        folder = self._folder()
        if self._in_folders():
            _needs_no_other(self, columns)
            for name, path in _unique(images.clients(folder)):
                yield name, self.task.in_folder(path, self.data, self.name)
        else:
            for name, path in self._holders():
                yield name, rows_at(path, columns, self.data.encoding, self.remarks)

    def origin(self, rows: Sequence[Row]) -> Origin:
        """As in Source."""
        folder = _path(self.data)
        if self._in_folders():
            sha256 = images.tree_fingerprint(folder, [row["image"] for row in rows])
        else:
            paths = [file for _, path in self._holders() for file in files_of(path).values()]
            sha256 = fingerprint(paths, folder)
        return origin(folder.name, f"the folder {folder}", sha256)

    def place(self, client: str) -> str:
        """As in Clients."""
        if self._in_folders():
            return super().place(client)
        return str(dict(self._holders())[client])

    def _folder(self) -> Path:
        folder = _path(self.data)
        if not folder.is_dir():
            raise DataError(
                f"the folder of silos {folder} does not exist or is a file; data.path names a "
                "folder"
            )
        if purposes_of([path for path in folder.iterdir() if not passed_over(path)]):
            raise DataError(
                f"{folder} holds what is for training and for the test, not one client each; put "
                'them into a folder for each client, or set data.source = "table"'
            )
        return folder

    def _in_folders(self) -> bool:
        folder = _path(self.data)
        if not (self.task.folders and images.is_tree(folder)):
            return False
        return not any(_are_files(files_of(path)) for path in folder.iterdir() if path.is_dir())

    def _holders(self) -> list[tuple[str, Path]]:
        """The clients' files by name, or their folders with files for training and the test; hidden
        files and notes (``.md``, ``.toml``) are passed over, all else must be data.
        """
        folder = _path(self.data)
        found = sorted(folder.iterdir(), key=lambda path: path.name)
        holders = [path for path in found if not passed_over(path)]
        refuse_pairs(holders)
        for path in holders:
            _check_holder(path)
        if not holders:
            raise DataError(
                f"the folder of silos {folder} has no data files ({KINDS}); put one file per "
                "client there"
            )
        return list(_unique(holders))


def _check_holder(path: Path) -> None:
    files = files_of(path)
    if path.is_dir() and not files:
        raise DataError(
            f"{path} is not a client's data file ({KINDS}) but a folder without files for training "
            'and the test (train, test); folders of images need data.task = "classify-images"'
        )
    for file in files.values():
        if file.suffix.lower() not in READERS or not file.is_file():
            raise DataError(
                f"{file} is not a client's data file ({KINDS}); convert it or move it away"
            )
    if not files:
        raise DataError(f"{path} is a link that leads nowhere; repair or remove it")


def _unique(paths: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Each file or folder with its client's name. Raises DataError for one that cannot name a
    client, and for two that name the same.
    """
    named: dict[str, Path] = {}  # by what a case-blind file system sees
    for path in paths:
        spelt = path.name if path.is_dir() else path.stem
        name = client_name(spelt)
        if name is None:
            where = "" if path.is_dir() else " before the ending"
            raise DataError(f"{path} cannot name a client: use{where} {RULE}")
        other = named.setdefault(name.casefold(), path)
        if other != path:
            raise DataError(
                f"{other} and {path} name the same client {name!r}; rename or merge one of them"
            )
        yield name, path


def _needs_no_other(source: TableSource | SilosSource, columns: Sequence[str]) -> None:
    """Folders of images have labels and nothing else."""
    own = source.task.columns(source.data)
    for column in columns:
        if column not in own:
            raise JobError(
                f"{column!r} needs a table with that column (data.group, data.split, or "
                "data.partition.options.partition_by); folders of images have labels alone"
            )
