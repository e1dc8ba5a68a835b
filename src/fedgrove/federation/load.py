"""The checked rows of a job: read by its source, with the columns that its task asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.federation.readers import KINDS, Found, Place, Row, Values, label_of, records
from fedgrove.federation.sources.base import Clients, Origin, Rows, Source
from fedgrove.federation.tasks import Task, task_class
from fedgrove.ground.errors import DataError, JobError

if TYPE_CHECKING:
    from fedgrove.job import DataSection, Job

SUPERCLASS = "superclass"  # the column that a partition by "sc-dirichlet" goes by


@dataclass(frozen=True)
class Table:
    """Rows still to be split into clients; ``columns`` holds, row by row, what a partitioner may
    look at.
    """

    rows: list[Row]
    columns: dict[str, list[Any]]
    group: str | None  # the column of the natural groups
    source: Origin


@dataclass(frozen=True)
class Silos:
    """Rows by client, from data that came split; ``groups`` gives each client's natural group."""

    clients: dict[str, list[Row]]
    groups: dict[str, str | None]
    source: Origin


def load(job: Job) -> Table | Silos:
    """The checked rows of the job's data source.

    Raises DataError for what is wrong with the data (file, line, column) and JobError for what is
    wrong with the job.
    """
    source = job.data.source_class(job.data, task_class(job.data))
    if isinstance(source, Clients):
        return _silos(job.data, source)
    assert isinstance(source, Rows)
    return _table(job.data, source)


def rows_of(path: Path, job: Job) -> list[Row]:
    """The checked rows of one more table (or a folder of images, ``LABEL/*.png``) with the job's
    columns.
    """
    task = task_class(job.data)
    if task.folders and path.is_dir():
        return [row for row, _, _ in _checked(task, job.data, task.in_folder(path, job.data, ""))]
    if not path.is_file():
        if task.folders:
            raise DataError(
                f"{path} does not exist; name a folder with one folder for each label, or a "
                f"parquet file"
            )
        raise DataError(f"the table {path} does not exist or is a folder; name one file ({KINDS})")
    found = records(path, task.columns(job.data))
    rows = [row for row, _, _ in _checked(task, job.data, found)]
    if not rows:
        raise DataError(f"the table {path} has no rows; give a file with rows")
    return rows


# ------------------------------------------------------------------ by client
def _silos(data: DataSection, source: Clients[Any]) -> Silos:
    column = data.group
    wanted = _unique([*source.task.columns(data), column])
    clients: dict[str, list[Row]] = {}
    groups: dict[str, str | None] = {}
    for name, found in source.read(wanted):
        clients[name], groups[name] = _of_one_client(source.task, data, found)
        if not clients[name]:
            raise DataError(f"{source.place(name)} has no rows; remove it or fill it")
    rows = [row for own in clients.values() for row in own]
    return Silos(clients, groups, _told(source, rows))


def _of_one_client(
    task: type[Task[Any]], data: DataSection, found: Found
) -> tuple[list[Row], str | None]:
    column = data.group
    rows: list[Row] = []
    group: str | None = None
    for row, place, values in _checked(task, data, found):
        value = label_of(values[column], column, place) if column else None
        if rows and value != group:
            raise DataError(
                f"{place}: a silo belongs to one group, but {column!r} is {value!r} after {group!r}"
            )
        group = value
        rows.append(row)
    return rows, group


# ------------------------------------------------------------------ one table
def _table(data: DataSection, source: Rows[Any]) -> Table:
    seen = source.seen()
    group = source.grouped() or data.group
    beside = _unique([group, partition_column(data)])
    own = source.task.columns(seen)
    label = getattr(seen, "label", None)
    names = [name for name in _unique([*own, *beside]) if name in beside or name == label]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    rows: list[Row] = []
    found = _of_groups(data, source.read(_unique([*own, *beside])), group)
    for row, place, values in _checked(source.task, seen, found):
        rows.append(row)
        for name, column in columns.items():
            named = name in (group, label)
            column.append(_what_to_go_by(values[name], name, place, named))
    origin = _told(source, rows)
    if not rows:
        raise DataError(f"{origin['name']} has no rows; give a file or data set with rows")
    return Table(rows, columns, group, origin)


def partition_column(data: DataSection) -> str | None:
    """The column that the job's partitioner goes by, where it is not the label."""
    chosen = data.partition
    default = SUPERCLASS if chosen.by == "sc-dirichlet" else None
    column = chosen.options.get("partition_by", default)
    return column if isinstance(column, str) else None


def _what_to_go_by(value: Any, name: str, place: Place, named: bool) -> Any:
    """A number stays one (unless it is nan), so that a partitioner may compare; labels and groups
    are names.
    """
    number = isinstance(value, int | float) and value == value
    return value if number and not named else label_of(value, name, place)


def _of_groups(data: DataSection, found: Found, group: str | None) -> Found:
    """The rows of ``data.groups`` alone, where it is set. Raises JobError for one that no row
    belongs to.
    """
    if data.groups is None or group is None:
        yield from found
        return
    unseen, present = set(data.groups), set()
    for place, values in found:
        name = label_of(values[group], group, place)
        present.add(name)
        matching = {pattern for pattern in data.groups if fnmatchcase(name, pattern)}
        unseen -= matching
        if matching:
            yield place, values
    if unseen:
        there = ", ".join(sorted(present)[:12]) + (", …" if len(present) > 12 else "")
        raise JobError(
            f"data.groups has {min(unseen)!r}, but the column {group!r} has no such group; it has: "
            f"{there}"
        )


# ------------------------------------------------------------------ both
def _checked(
    task: type[Task[Any]], data: DataSection, found: Found
) -> Iterator[tuple[Row, Place, Values]]:
    """Each row as the task reads it, its place, and its raw values."""
    for place, values in found:
        yield task.row(values, data, place), place, values


def _told(source: Source[Any], rows: list[Row]) -> Origin:
    return {"source": source.name, **source.origin(rows)}


def _unique(names: list[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))
