"""Small sets of rows that are made up from templates: nothing is fetched, and nobody owns them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from fedgrove.federation.charts import charts
from fedgrove.federation.notes import notes
from fedgrove.federation.readers import Found, Row
from fedgrove.federation.replies import replies
from fedgrove.federation.sources.base import Origin, Rows, origin
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.options import Options, Text
from fedgrove.ground.plain import Plain

FIRST = "notes"
#: by name what makes its rows, and what it is
SETS: Mapping[str, tuple[Callable[[], Iterable[Plain]], str]] = {
    "notes": (notes, "notes of four made-up clinics, put together from templates"),
    "charts": (
        charts,
        "questions about charts of four made-up clinics, put together from templates",
    ),
    "replies": (replies, "two replies each to questions of patients, put together from templates"),
}


class MadeOptions(Options):
    """The key of made-up sets."""

    made: Text = Field(
        FIRST,
        description="Name of the made-up set. notes: notes of four clinics, with the columns text, "
        "topics, spans, urgency, days and clinic. charts: questions about several notes, with the "
        "columns question, context, answers and clinic. replies: pairs of replies, with the columns "
        "prompt, chosen, rejected, about and clinic.",
    )


class MadeSource(Rows[MadeOptions]):
    """By its name."""

    name: ClassVar[str] = "made"
    about: ClassVar[str] = "a small set made up from templates, to try a task with"
    Options: ClassVar[type[MadeOptions]] = MadeOptions

    def read(self, columns: Sequence[str]) -> Found:
        """As in Rows."""
        make, _ = self._set()
        for number, row in enumerate(make(), start=1):
            for column in columns:
                if column not in row:
                    raise DataError(
                        f"the made-up set {self.data.made!r} has no column {column!r}; it has: "
                        f"{', '.join(row)}"
                    )
            yield f"{self.data.made}, row {number}", row

    def origin(self, rows: Sequence[Row]) -> Origin:
        """As in Source."""
        make, about = self._set()
        digest = hashlib.sha256()
        for row in make():
            digest.update(json.dumps(row, sort_keys=True).encode())
        return origin(
            self.data.made,
            about,
            digest.hexdigest(),
            "none needed: made up",
        )

    def _set(self) -> tuple[Callable[[], Iterable[Plain]], str]:
        if self.data.made not in SETS:
            known = ", ".join(map(repr, sorted(SETS)))
            raise JobError(f"data.made = {self.data.made!r} is no made-up set: take {known}")
        return SETS[self.data.made]
