"""What a data source is: rows with the columns that a task reads, as one table or by client.

A new source is one file: a class that extends ``Rows`` (a table, still to be split) or ``Clients``
(one that comes split), has a name, and declares its keys of ``[data]`` in its ``Options``. It lies
in this folder, or in a package of its own with an entry point of the group ``fedgrove.sources``, or
is given to ``fedgrove.federation.sources.register``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from fedgrove.federation.readers import Found, Remarks, Row
from fedgrove.ground import options
from fedgrove.ground.plain import Given, Plain

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Task

Origin = Plain
Keys = TypeVar("Keys", bound=options.Options)


class Source(ABC, Generic[Keys]):
    """One way to come by rows. ``data`` is the job's ``[data]`` section: it has the keys that the
    source's ``Options`` declare, and those of the job's task.

    Every method raises ``DataError`` for what is wrong with the data (file, line, column), and
    ``JobError`` for what is wrong with the job.
    """

    name: ClassVar[str]  # of data.source
    about: ClassVar[str]  # what it is, in a few words, for `fedgrove job --explain`
    Options: ClassVar[type[options.Options]] = options.Options

    def __init__(self, data: Keys, task: type[Task]):
        self.data, self.task = data, task
        self.remarks = Remarks()  # what was found out while reading

    @classmethod
    def meant_for(cls, values: Given) -> str | None:
        """The task that the data are for (``data.task = "auto"``), where the source knows it;
        ``values`` are the job's, not yet checked.
        """
        return None

    @classmethod
    def fits(cls, task: str) -> str:
        """Why the source has no data for a task, by its name; "" where it may have."""
        return ""

    def origin(self, rows: Sequence[Row]) -> Origin:
        """Where the data come from: "name", "licence", "note" and "sha256"; asked after they were
        read, with the checked rows.
        """
        return origin(self.name)


class Rows(Source[Keys]):
    """One table, to be split into clients."""

    def grouped(self) -> str | None:
        """The column of the natural groups, where the source brings one of its own."""
        return None

    def seen(self) -> Keys:
        """The section as the task is to read it: where the source names columns itself, with those
        names.
        """
        return self.data

    @abstractmethod
    def read(self, columns: Sequence[str]) -> Found:
        """Each row with its place (for messages) and at least these columns."""


class Clients(Source[Keys]):
    """Rows that come by client."""

    def place(self, client: str) -> str:
        """What messages call a client's rows."""
        return f"the client {client!r}"

    @abstractmethod
    def read(self, columns: Sequence[str]) -> Iterable[tuple[str, Found]]:
        """Each client's name and rows, in the order of the names; rows as in ``Rows.read``."""


def origin(
    name: str,
    note: str = "",
    sha256: str = "",
    licence: str = "the owner's",
) -> Origin:
    """What is kept of where data come from."""
    return {"name": name, "licence": licence, "note": note, "sha256": sha256}
