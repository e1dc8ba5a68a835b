"""A data set that Fedgrove fetches and checks by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

from pydantic import Field

from fedgrove.federation.assets import ASSETS, asset
from fedgrove.federation.embedded import EMBEDDED, Embedded
from fedgrove.federation.readers import Found, Row
from fedgrove.federation.sources.base import Origin, Rows, origin
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.options import Options, Text
from fedgrove.ground.plain import Given

FIRST = "sentiment"


class EmbeddedOptions(Options):
    """The keys of embedded data sets."""

    name: Text = Field(FIRST, description="Name of the embedded data set.")


class EmbeddedSource(Rows[EmbeddedOptions]):
    """By its name."""

    name: ClassVar[str] = "embedded"
    about: ClassVar[str] = "a data set that Fedgrove fetches and checks by itself"
    Options: ClassVar[type[EmbeddedOptions]] = EmbeddedOptions

    @classmethod
    def meant_for(cls, values: Given) -> str | None:
        """As in Source."""
        name = values.get("name", FIRST)
        if isinstance(name, str) and name in EMBEDDED:
            return EMBEDDED[name].task
        return None

    def read(self, columns: Sequence[str]) -> Found:
        """As in Rows."""
        which, name = self._set(), self.data.name
        rows = iter(which.read(asset(which.asset)))
        first = next(rows)
        for column in columns:
            if column not in first:
                raise DataError(
                    f"the embedded set {name!r} has no column {column!r}; it has: "
                    f"{', '.join(first)}"
                )
        for number, row in enumerate(chain([first], rows), start=1):
            yield f"{name}, row {number}", row

    def origin(self, rows: Sequence[Row]) -> Origin:
        """As in Source."""
        kept = ASSETS[self._set().asset]
        note = f"{kept.about}; from the package {kept.package}"
        return origin(self.data.name, note, kept.package.sha256, kept.licence)

    def _set(self) -> Embedded:
        name = self.data.name
        if name not in EMBEDDED:
            known = ", ".join(map(repr, sorted(EMBEDDED)))
            raise JobError(
                f"data.name = {name!r} is no embedded data set: take {known}, or set data.source"
            )
        return EMBEDDED[name]
