"""Where the rows come from: an embedded set, a folder of silos, one table, or a data set of the
hub.

Whatever the source calls its columns, a row here has the names that the task gives it: see
``Task.row``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.federation import images
from fedgrove.federation.assets import ASSETS, asset
from fedgrove.federation.embedded import EMBEDDED
from fedgrove.federation.readers import READERS, Place, Row, fingerprint, label_of, records
from fedgrove.federation.tasks import task_class, task_name
from fedgrove.ground.errors import DataError, JobError

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.job.sections import DataSection, PartSection

#: what a client may be called: a folder name on any file system that never looks like one of ours
#: (``_global``)
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_-])?")

Found = Iterable[tuple[Place, dict[str, Any]]]

SUPERCLASS = "superclass"  # the column that a partition by "sc-dirichlet" goes by

PART = "part"  # the column of groups of a federation made of several data sets


@dataclass(frozen=True)
class Table:
    """Rows still to be split into clients; ``columns`` holds, row by row, what a partitioner may
    look at.
    """

    rows: list[Row]
    columns: dict[str, list[Any]]
    group: str | None  # the column of the natural groups
    source: dict[str, Any]


@dataclass(frozen=True)
class Silos:
    """Rows by client, from data that came split; ``groups`` gives each client's natural group."""

    clients: dict[str, list[Row]]
    groups: dict[str, str | None]
    source: dict[str, Any]


def load(job: Job) -> Table | Silos:
    """The checked rows of the job's data source.

    Raises DataError for what is wrong with the data (file, line, column) and JobError for what is
    wrong with the job.
    """
    if job.data.source == "silos":
        return _silos(job)
    return {"embedded": _embedded, "table": _table, "hub": _hub}[job.data.source](job)


def _embedded(job: Job) -> Table:
    name = job.data.name
    if name not in EMBEDDED:
        known = ", ".join(map(repr, sorted(EMBEDDED)))
        raise JobError(
            f"data.name = {name!r} is no embedded data set: take {known}, or set data.source"
        )
    which, kept = EMBEDDED[name], ASSETS[EMBEDDED[name].asset]
    rows = iter(which.read(asset(which.asset)))
    first = next(rows)
    group = job.data.group or None
    for column in _wanted(job, group):
        if column not in first:
            raise DataError(
                f"the embedded set {name!r} has no column {column!r}; it has: {', '.join(first)}"
            )
    rows = chain([first], rows)
    note = f"{kept.about}; from the package {kept.package}"
    source = _source("embedded", name, note, kept.package.sha256) | {"licence": kept.licence}
    return _gather(
        job,
        ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1)),
        source,
        group,
    )


def _table(job: Job) -> Table:
    path = _path(job, "the table")
    if path.is_dir() and task_name(job.data) == "classify-images":
        _without_columns(job)
        table = _gather(
            job,
            _labelled(job, path, "table"),
            _source("table", path.name, f"the folder {path}", ""),
            None,
        )
        table.source["sha256"] = images.tree_fingerprint(path, [row["image"] for row in table.rows])
        return table
    if not path.is_file():
        raise DataError(
            f"the table {path} does not exist or is a folder; data.path names one file ({_kinds()})"
        )
    group = job.data.group or None
    source = _source("table", path.name, f"the file {path}", fingerprint([path]))
    return _gather(job, records(path, _wanted(job, group)), source, group)


def _hub(job: Job) -> Table:
    data = job.data
    if not data.parts:
        group = data.group or None
        found, source = _hub_rows(data.name, data.config, None, _wanted(job, group))
        return _gather(job, found, source, group)
    # each part's columns get the same names, so that from here on there is one table with a column
    # of groups
    job = job.replace(
        data={"parts": (), "text": "text", "pair": "pair", "label": "label", "group": PART}
    )
    tables = []
    for part in data.parts:
        wanted = [part.text, *([part.pair] if part.pair else []), part.label]
        found, source = _hub_rows(part.dataset or data.name, part.config, part.split, wanted)
        tables.append(_gather(job, _renamed(part, found), source, PART))
    return Table(
        [row for table in tables for row in table.rows],
        {
            name: [value for table in tables for value in table.columns[name]]
            for name in tables[0].columns
        },
        PART,
        tables[0].source
        | {"note": "; ".join(f"{t.source['name']}, {t.source['note']}" for t in tables)},
    )


def _renamed(part: PartSection, found: Found) -> Found:
    for place, values in found:
        label = label_of(values[part.label], part.label, place)
        pair = values[part.pair] if part.pair else None
        yield (
            place,
            {
                "text": values[part.text],
                "pair": pair,
                "label": f"{part.name}: {label}",
                PART: part.name,
            },
        )


def _hub_rows(
    name: str, config: str | None, split: str | None, wanted: list[str]
) -> tuple[Found, dict[str, Any]]:
    """The wanted columns of a hub data set, class numbers as names; ``split`` None: "train", or the
    only one.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, config)
    except (
        Exception
    ) as error:  # its own classes, the network's, the file system's: all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"the hub data set {name!r} cannot be loaded: {reason}; check data.name, data.config "
            f"and the network, "
            'or use local files (data.source = "silos" or "table")'
        ) from error
    splits = list(loaded)
    if split not in splits:
        if split is not None or ("train" not in splits and len(splits) != 1):
            wish = split or "train"
            raise DataError(
                f"the hub data set {name!r} has no split {wish!r}, only: {', '.join(splits)}"
            )
        split = "train" if "train" in splits else splits[0]
    table = loaded[split]
    for column, feature in table.features.items():
        if isinstance(
            feature, datasets.Image
        ):  # the file's bytes: decoded one by one, when they are looked at
            table = table.cast_column(column, datasets.Image(decode=False))
    for column in wanted:
        if column not in table.column_names:
            present = ", ".join(table.column_names)
            raise DataError(
                f"the hub data set {name!r} has no column {column!r}; it has: {present}"
            )

    def found() -> Iterator[tuple[Place, dict[str, Any]]]:
        for number, values in enumerate(table.select_columns(wanted), start=1):
            for column in wanted:
                feature = table.features[column]
                if isinstance(feature, datasets.ClassLabel) and values[column] is not None:
                    code = values[column]
                    values[column] = (
                        feature.int2str(code) if code >= 0 else None
                    )  # -1 stands for "unlabelled"
            yield f"{name}, row {number} of split {split!r}", values

    version = str(table.info.version or "unknown")
    source = _source(
        "hub", name, f"split {split!r}, configuration {config or 'default'}, version {version}", ""
    )
    return found(), source | {"licence": table.info.license or "see the hub"}


def _silos(job: Job) -> Silos:
    folder = _path(job, "the folder with one file per client")
    if not folder.is_dir():
        raise DataError(
            f"the folder of silos {folder} does not exist or is a file; data.path names a folder"
        )
    if task_name(job.data) == "classify-images" and images.is_tree(folder):
        return _image_silos(job, folder)
    files = _silo_files(folder)
    clients: dict[str, list[Row]] = {}
    groups: dict[str, str | None] = {}
    column = job.data.group or None
    for path in files:
        rows: list[Row] = []
        group: str | None = None
        for row, place, extra in _checked(job.data, records(path, _wanted(job, column))):
            value = label_of(extra[column], column, place) if column else None
            if rows and value != group:
                raise DataError(
                    f"{place}: a silo belongs to one group, but {column!r} is {value!r} after "
                    f"{group!r}"
                )
            group = value
            rows.append(row)
        if not rows:
            raise DataError(f"{path} has no rows; remove the file or fill it")
        clients[path.stem], groups[path.stem] = rows, group
    return Silos(
        clients, groups, _source("silos", folder.name, f"the folder {folder}", fingerprint(files))
    )


def _image_silos(job: Job, folder: Path) -> Silos:
    _without_columns(job)
    clients: dict[str, list[Row]] = {}
    for path in images.clients(folder):
        if not NAME.fullmatch(path.name):
            raise DataError(
                f"{path} cannot name a client: use at most 64 letters (a-z), digits, '.', '_' and "
                f"'-', with a letter "
                "or digit first"
            )
        if other := next(
            (name for name in clients if name.casefold() == path.name.casefold()), None
        ):
            raise DataError(
                f"{path.parent / other} and {path} name the same client; rename or merge one of "
                f"them"
            )
        clients[path.name] = [
            row for row, _, _ in _checked(job.data, _labelled(job, path, "silos"))
        ]
    sha256 = images.tree_fingerprint(
        folder, [row["image"] for rows in clients.values() for row in rows]
    )
    return Silos(
        clients,
        dict.fromkeys(clients),
        _source("silos", folder.name, f"the folder {folder}", sha256),
    )


def _labelled(job: Job, folder: Path, source: str = "") -> Found:
    """The images of ``folder/LABEL/*.png`` as rows with the job's columns."""
    for place, path, label in images.labelled(folder, source):
        yield place, {job.data.image: path, job.data.label: label}


def _without_columns(job: Job) -> None:
    """Image folders have labels and nothing else."""
    by = job.data.partition.options.get(
        "partition_by", SUPERCLASS if job.data.partition.by == "sc-dirichlet" else None
    )
    for key, column in (
        ("data.group", job.data.group),
        ("data.partition.options.partition_by", by),
    ):
        if column not in (None, job.data.label):
            raise JobError(
                f"{key} = {column!r} needs a table with that column; folders of images have labels "
                f"alone"
            )


def _silo_files(folder: Path) -> list[Path]:
    """The client files by name; hidden files and notes (``.md``, ``.toml``) are passed over, all
    else must be data.
    """
    files: list[Path] = []
    names: dict[str, Path] = {}  # by what a case-blind file system sees
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith(".") or path.suffix.lower() in (".md", ".toml"):
            continue
        if path.is_dir():
            raise DataError(
                f"{path} is not a client's data file ({_kinds()}) but a folder; folders of images "
                f"need "
                'data.task = "classify-images"'
            )
        if path.suffix.lower() not in READERS or not path.is_file():
            raise DataError(
                f"{path} is not a client's data file ({_kinds()}); convert it or move it away"
            )
        if not NAME.fullmatch(path.stem):
            raise DataError(
                f"{path} cannot name a client: use at most 64 letters (a-z), digits, '.', '_' and "
                f"'-' before the "
                "ending, with a letter or digit first"
            )
        if (other := names.setdefault(path.stem.casefold(), path)) != path:
            raise DataError(
                f"{other} and {path} name the same client {path.stem!r}; rename or merge one of "
                f"them"
            )
        files.append(path)
    if not files:
        raise DataError(
            f"the folder of silos {folder} has no data files ({_kinds()}); put one file per client "
            f"there"
        )
    return files


def _path(job: Job, what: str) -> Path:
    if not job.data.path:
        raise JobError(
            f'data.path is not set; with data.source = "{job.data.source}" it names {what}'
        )
    return Path(job.data.path).expanduser()


def _kinds() -> str:
    return ", ".join(READERS)


def _source(kind: str, name: str, note: str, sha256: str) -> dict[str, Any]:
    return {"source": kind, "name": name, "licence": "the owner's", "note": note, "sha256": sha256}


def _wanted(job: Job, group: str | None) -> list[str]:
    """The columns to read: the task's own, the natural group, and the one a partitioner goes by."""
    chosen = job.data.partition
    column = chosen.options.get("partition_by", SUPERCLASS if chosen.by == "sc-dirichlet" else None)
    by = column if job.data.source != "silos" else None
    own = task_class(job.data).columns(job.data)
    return list(dict.fromkeys([*own, *(name for name in (group, by) if isinstance(name, str))]))


def _checked(data: DataSection, found: Found) -> Iterator[tuple[Row, Place, dict[str, Any]]]:
    """Each row as the task reads it, its place, and its raw values."""
    task = task_class(data)
    for place, values in found:
        yield task.row(values, data, place), place, values


def _gather(job: Job, found: Found, source: dict[str, Any], group: str | None) -> Table:
    rows: list[Row] = []
    own = task_class(job.data).columns(job.data)
    names = [name for name in _wanted(job, group) if name not in own or name == job.data.label]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for row, place, values in _checked(job.data, _of_groups(job.data, found, group)):
        rows.append(row)
        for name, column in columns.items():
            value = values[name]
            # what a partitioner goes by stays a number where it is one (and not nan); labels and
            # groups are names
            number = (
                isinstance(value, int | float)
                and value == value
                and name not in (group, job.data.label)
            )
            column.append(value if number else label_of(value, name, place))
    if not rows:
        raise DataError(f"{source['name']} has no rows; give a file or data set with rows")
    return Table(rows, columns, group, source)


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


def rows_of(path: Path, job: Job) -> list[Row]:
    """The checked rows of one more table (jsonl, csv, parquet; images: ``LABEL/*.png``) with the
    job's columns.
    """
    if path.is_dir() and task_name(job.data) == "classify-images":
        return [row for row, _, _ in _checked(job.data, _labelled(job, path))]
    if not path.is_file():
        if task_name(job.data) == "classify-images":
            raise DataError(
                f"{path} does not exist; name a folder with one folder for each label, or a "
                f"parquet file"
            )
        raise DataError(
            f"the table {path} does not exist or is a folder; name one file ({_kinds()})"
        )
    rows = [
        row
        for row, _, _ in _checked(job.data, records(path, task_class(job.data).columns(job.data)))
    ]
    if not rows:
        raise DataError(f"the table {path} has no rows; give a file with rows")
    return rows
