"""A data source: a folder with one ``CLIENT.txt`` for each client, a row on each line, fields
separated by a sign.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from fedgrove.federation.readers import Found, Row, fingerprint
from fedgrove.federation.sources.base import Clients, Origin, origin
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import Options, Text


class TextFilesOptions(Options):
    """The source's keys in ``[data]``."""

    folder: Text = Field("texts", description="The folder of the clients' files.")
    fields: Text = Field("rating|text", description="What stands on a line, and the sign between.")


class TextFiles(Clients[TextFilesOptions]):
    """Rows by client: the task says what columns it reads, the source gives them with places."""

    name: ClassVar[str] = "text-files"
    about: ClassVar[str] = "a folder with CLIENT.txt, a row on each line"
    Options: ClassVar[type[TextFilesOptions]] = TextFilesOptions

    def read(self, columns: Sequence[str]) -> Iterable[tuple[str, Found]]:
        """As in Clients."""
        names = self.data.fields.split("|")
        for column in columns:
            if column not in names:
                raise DataError(f"data.fields = {self.data.fields!r} has no column {column!r}")
        for path in self._files():
            yield path.stem, _lines(path, names)

    def origin(self, rows: Sequence[Row]) -> Origin:
        """As in Source."""
        return origin(self.data.folder, "files of text", fingerprint(self._files()))

    def _files(self) -> list[Path]:
        return sorted(Path(self.data.folder).glob("*.txt"))


def _lines(path: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split("|", len(names) - 1)
        place = f"{path}, line {number}"
        if len(fields) != len(names):
            raise DataError(f"{place} has {len(fields)} fields, not {len(names)}")
        yield place, dict(zip(names, fields, strict=True))
