"""The checked rows of a job: read by its source, with the columns that its task asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.federation.labels import classes_of, doubtful, merged
from fedgrove.federation.otherwise import NUMBERS, OtherRows, are_measures
from fedgrove.federation.purposes import purpose_of, repeated
from fedgrove.federation.readers import KINDS, Found, Place, Row, Values, label_of
from fedgrove.federation.sources.base import Clients, Origin, Rows, Source
from fedgrove.federation.tables import files_of, rows_at
from fedgrove.federation.tasks import TASKS, Task, task_class
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.toml import value_text

if TYPE_CHECKING:
    from fedgrove.job import DataSection, Job

CLASSES = "the classes of a row"  # the column of their sets, where a row may have several
SUPERCLASS = "superclass"  # the column that a partition by "sc-dirichlet" goes by


@dataclass(frozen=True)
class Table:
    """Rows still to be split into clients; ``columns`` holds, row by row, what a partitioner may
    look at.
    """

    rows: list[Row]
    columns: dict[str, list[object]]
    group: str | None  # the column of the natural groups
    source: Origin
    purposes: list[str] | None = None  # what each row is for, where the data say so
    remarks: list[str] = field(default_factory=list)

    def every_row(self) -> Iterable[Row]:
        return self.rows

    def holdings(self) -> Iterable[tuple[str, list[Row], list[str] | None]]:
        """The name of the data, its rows, and what each is for."""
        yield str(self.source["name"]), self.rows, self.purposes


@dataclass(frozen=True)
class Silos:
    """Rows by client, from data that came split; ``groups`` gives each client's natural group."""

    clients: dict[str, list[Row]]
    groups: dict[str, str | None]
    source: Origin
    purposes: dict[str, list[str] | None] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def every_row(self) -> Iterable[Row]:
        return chain.from_iterable(self.clients.values())

    def holdings(self) -> Iterable[tuple[str, list[Row], list[str] | None]]:
        """Each client, its rows, and what each is for."""
        for name, rows in self.clients.items():
            yield name, rows, self.purposes.get(name)


@dataclass(frozen=True)
class Holding:
    """The rows of one holder, each with what it is for, where the data say so."""

    rows: list[Row]
    purposes: list[str] | None
    group: str | None = None


def load(job: Job) -> Table | Silos:
    """The checked rows of the job's data source.

    Raises DataError for what is wrong with the data (file, line, column) and JobError for what is
    wrong with the job.
    """
    source = job.data.source_class(job.data, task_class(job.data))
    if isinstance(source, Clients):
        loaded: Table | Silos = _silos(job.data, source)
    else:
        assert isinstance(source, Rows)
        loaded = _table(job.data, source)
    loaded.remarks.extend(source.remarks.sentences())
    loaded.remarks.extend(repeated(loaded.holdings()))
    if source.task.classifies and not job.data.classes:
        column = getattr(job.data, "label", "")
        if not source.task.several:
            _refuse_measures(loaded, column)
        _merge_spellings(loaded, source.task, column)
    return loaded


def rows_of(path: Path, job: Job) -> list[Row]:
    """The checked rows of one more table (or a folder of images, ``LABEL/*.png``) with the job's
    columns.
    """
    return _of_a_path(path, job, None).rows


def holding_of(path: Path, job: Job) -> Holding:
    """As ``rows_of``, with what each row is for, where files of a folder, or the job's column, say
    so.
    """
    return _of_a_path(path, job, job.data.split)


def _of_a_path(
    path: Path,
    job: Job,
    split: str | None,
) -> Holding:
    task, data = task_class(job.data), job.data
    if task.folders and path.is_dir():
        return _holding(task, data, task.in_folder(path, data, ""), split)
    if not files_of(path):
        if task.folders:
            raise DataError(
                f"{path} does not exist; name a folder with one folder for each label, or a "
                f"parquet file"
            )
        raise DataError(f"the table {path} does not exist or is a folder; name one file ({KINDS})")
    columns = _unique([*task.columns(data), split])
    found = rows_at(path, columns, getattr(data, "encoding", None))
    holding = _holding(task, data, found, split)
    if not holding.rows:
        raise DataError(f"the table {path} has no rows; give a file with rows")
    return holding


# ------------------------------------------------------------------ by client
def _silos(data: DataSection, source: Clients) -> Silos:
    wanted = _unique([*source.task.columns(data), data.group, data.split])
    held: dict[str, Holding] = {}
    for name, found in source.read(wanted):
        held[name] = _holding(source.task, data, found, data.split)
        if not held[name].rows:
            raise DataError(f"{source.place(name)} has no rows; remove it or fill it")
    clients = {name: holding.rows for name, holding in held.items()}
    groups = {name: holding.group for name, holding in held.items()}
    purposes = {name: holding.purposes for name, holding in held.items()}
    every = list(chain.from_iterable(clients.values()))
    return Silos(clients, groups, _told(source, every), purposes)


def _holding(
    task: type[Task],
    data: DataSection,
    found: Found,
    split: str | None,
) -> Holding:
    column = data.group
    rows: list[Row] = []
    purposes: list[str] = []
    group: str | None = None
    for row, place, values in _checked(task, data, found):
        value = None
        if column and column in values:
            value = label_of(values[column], column, place)
        if rows and value != group:
            raise DataError(
                f"{place}: a silo belongs to one group, but {column!r} is {value!r} after {group!r}"
            )
        group = value
        rows.append(row)
        purpose = purpose_of(values, split, place)
        if purpose:
            purposes.append(purpose)
    return Holding(rows, purposes or None, group)


# ------------------------------------------------------------------ one table
def _table(data: DataSection, source: Rows) -> Table:
    seen = source.seen()
    group = source.grouped() or data.group
    beside = _unique([group, partition_column(data)])
    own = source.task.columns(seen)
    label = None
    if not source.task.several:
        label = getattr(seen, "label", None)
    columns: dict[str, list[object]] = {}
    for name in _unique([*own, *beside]):
        if name in beside or name == label:
            columns[name] = []
    rows: list[Row] = []
    purposes: list[str] = []
    found = source.read(_unique([*own, *beside, data.split]))
    for row, place, values in _checked(source.task, seen, _of_groups(data, found, group)):
        rows.append(row)
        purpose = purpose_of(values, data.split, place)
        if purpose:
            purposes.append(purpose)
        for name, column in columns.items():
            named = name in (group, label)
            column.append(_what_to_go_by(values[name], name, place, named))
    if source.task.several:
        columns[CLASSES] = [row["label"] for row in rows]
    origin = _told(source, rows)
    if not rows:
        raise DataError(f"{origin['name']} has no rows; give a file or data set with rows")
    return Table(rows, columns, group, origin, purposes or None)


def partition_column(data: DataSection) -> str | None:
    """The column that the job's partitioner goes by, where it is not the label."""
    chosen = data.partition
    default = None
    if chosen.by == "sc-dirichlet":
        default = SUPERCLASS
    column = chosen.options.get("partition_by", default)
    if isinstance(column, str):
        return column
    return None


def _what_to_go_by(
    value: object,
    name: str,
    place: Place,
    named: bool,
) -> object:
    """A number stays one (unless it is nan), so that a partitioner may compare; labels and groups
    are names.
    """
    number = isinstance(value, int | float) and value == value
    if number and not named:
        return value
    return label_of(value, name, place)


def _of_groups(
    data: DataSection,
    found: Found,
    group: str | None,
) -> Found:
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
        there = ", ".join(sorted(present)[:12])
        if len(present) > 12:
            there += ", …"
        raise JobError(
            f"data.groups has {min(unseen)!r}, but the column {group!r} has no such group; it has: "
            f"{there}"
        )


# ------------------------------------------------------------------ both
def _refuse_measures(loaded: Table | Silos, column: str) -> None:
    rows = list(loaded.every_row())
    labels = {row["label"] for row in rows}
    if are_measures(labels, len(rows)):
        raise DataError(
            f"the column {column!r} has {len(labels)} different numbers in {len(rows)} rows, such "
            f"as {min(labels)}: {_whose(NUMBERS)}; if they are classes, list them in data.labels"
        )


def _merge_spellings(
    loaded: Table | Silos,
    task: type[Task],
    column: str,
) -> None:
    """Give rows that spell one label in several ways the same one, and say so."""
    rows = list(loaded.every_row())
    labels: set[str] = set()
    for row in rows:
        labels.update(task.classes_in(row))
    classes = classes_of(labels)
    several = merged(classes)
    loaded.remarks.extend(doubtful(set(classes.values())))
    if not several:
        return
    for row in rows:
        task.respell(row, classes)
    if isinstance(loaded, Table) and column in loaded.columns:
        respelt: list[object] = []
        for label in loaded.columns[column]:
            if isinstance(label, str):
                respelt.append(classes.get(label, label))
            else:
                respelt.append(label)
        loaded.columns[column] = respelt
    for name, spellings in several.items():
        listed = ", ".join(map(repr, spellings))
        loaded.remarks.append(f"The labels {listed} are taken for one, {name!r}.")


def _checked(
    task: type[Task],
    data: DataSection,
    found: Found,
) -> Iterator[tuple[Row, Place, Values]]:
    """Each row as the task reads it, its place, and its raw values. Rows of another task are told
    whose they are.
    """
    try:
        for place, values in found:
            yield task.row(values, data, place), place, values
    except OtherRows as error:
        raise DataError(f"{error}: {_whose(error.kind)}") from error


def _whose(kind: str) -> str:
    names = [name for name, task in TASKS.catalogue().items() if kind in task.suits]
    if names:
        tasks = " or ".join(map(value_text, names))
        return f"{kind} is learnt with data.task = {tasks}"
    return f"{kind} is another task, which Fedgrove does not have yet"


def _told(source: Source, rows: list[Row]) -> Origin:
    return {"source": source.name, **source.origin(rows)}


def _unique(names: list[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))
