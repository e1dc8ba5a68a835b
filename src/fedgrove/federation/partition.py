"""Splits one table into clients with any partitioner of flwr-datasets, whole or within natural
groups.

The partitioners are the library's; here are only their names, their checked options, the seeds and
the messages.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import os
import unicodedata
import warnings
from typing import TYPE_CHECKING, Any

import numpy

from fedgrove.federation.load import CLASSES, SUPERCLASS, Table
from fedgrove.federation.readers import label_of
from fedgrove.federation.tasks import task_class
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.names import client_name, is_letter
from fedgrove.ground.plain import Plain
from fedgrove.ground.seeds import derive, numpy_rng

if TYPE_CHECKING:
    from fedgrove.job import Job

#: short names, and options that make a sensible partition where the job gives none
ALIASES: dict[str, tuple[str, Plain]] = {
    "iid": ("IidPartitioner", {}),
    "dirichlet": ("DirichletPartitioner", {"alpha": 0.5}),
    "sc-dirichlet": (
        "DirichletPartitioner",
        {"alpha": 3.0, "partition_by": SUPERCLASS},
    ),  # HiLoRA's SC-Dir
    "inner-dirichlet": ("InnerDirichletPartitioner", {"alpha": 0.5}),
    # "deterministic" deals the classes out in turn, so none is left without a client
    "pathological": (
        "PathologicalPartitioner",
        {"num_classes_per_partition": 2, "class_assignment_mode": "deterministic"},
    ),
    "shard": ("ShardPartitioner", {"num_shards_per_partition": 2}),
    "distribution": ("DistributionPartitioner", {}),
    "continuous": ("ContinuousPartitioner", {"strictness": 0.5}),
    "natural": ("NaturalIdPartitioner", {}),
    "grouped-natural": ("GroupedNaturalIdPartitioner", {}),
    "size": ("SizePartitioner", {}),
    "linear": ("LinearPartitioner", {}),
    "square": ("SquarePartitioner", {}),
    "exponential": ("ExponentialPartitioner", {}),
}
#: these find their clients in the data, whatever federation.clients says
NATURAL = ("NaturalIdPartitioner", "GroupedNaturalIdPartitioner")
_MINIMUM = (
    "min_partition_size"  # the key of several partitioners: rows that each client gets at least
)
#: what the job's other keys decide
OURS = {"num_partitions": "federation.clients", "seed": "run.seed"}


def partition(table: Table, job: Job) -> dict[str, tuple[list[int], str | None]]:
    """``{client name: (row numbers of the table, natural group)}``, sorted by name.

    With natural groups the clients are spread evenly over them (what is left over goes to the
    larger groups) and each group is split on its own. Raises JobError for the partition's name or
    options, DataError for too few rows.
    """
    maker, options = _partitioner(job, table)
    # clients that are natural ids are not split further by the column that names them
    column = table.group
    if column == options.get("partition_by"):
        column = None
    members = _members(table, column)
    if maker.__name__ in NATURAL:
        named = _natural(table, job, maker, options, members)
    else:
        named = _even(table, job, maker, options, members)
    return dict(sorted(named.items()))


Members = dict[str | None, list[int]]
Named = dict[str, tuple[list[int], str | None]]


def _members(table: Table, column: str | None) -> Members:
    """Row numbers by group, in the groups' order; all of None without a column of groups."""
    every = list(range(len(table.rows)))
    if not column:
        return {None: every}
    found: Members = {}
    for number in every:
        group = str(table.columns[column][number])
        found.setdefault(group, []).append(number)
    return {group: found[group] for group in sorted(found, key=str)}


def _even(
    table: Table,
    job: Job,
    maker: Any,
    options: Plain,
    members: Members,
) -> Named:
    """As many clients as the job asks for, named after their group."""
    clients = job.federation.clients
    if clients < len(members):
        raise JobError(
            f"federation.clients = {clients} is fewer than the {len(members)} groups of the column "
            f"{table.group!r}; "
            'give at least one client a group, or set data.group = ""'
        )
    every, left = divmod(clients, len(members))
    larger = sorted(members, key=lambda group: (-len(members[group]), str(group)))[:left]
    prefixes = _prefixes(list(members), table.group)
    named: Named = {}
    for group, numbers in members.items():
        count = every
        if group in larger:
            count += 1
        parts = _parts(
            table,
            job,
            maker,
            options,
            group,
            numbers,
            count,
        )
        width = len(str(len(parts) - 1))
        if group is None:
            width = max(2, width)
        for number, rows in enumerate(parts):
            name = f"{prefixes[group]}-{number:0{width}}"
            named[name] = (rows, group)
    return named


def _natural(
    table: Table,
    job: Job,
    maker: Any,
    options: Plain,
    members: Members,
) -> Named:
    """The clients that the data name, however many; they keep their ids where these can be file
    names.
    """
    found: list[tuple[list[int], str | None]] = []
    for group, numbers in members.items():
        parts = _parts(
            table,
            job,
            maker,
            options,
            group,
            numbers,
            None,
        )
        found += [(rows, group) for rows in parts]
    found.sort(key=lambda part: part[0])
    column = table.columns[options["partition_by"]]
    ids: list[str | None] = []
    for rows, _ in found:
        told = label_of(column[rows[0]], "", "")
        ids.append(client_name(told))
    names = [name for name in ids if name is not None]
    different = {name.casefold() for name in names}
    # an id that is no file name is missing in names, and one that only case tells apart is twice
    if maker.__name__ != "NaturalIdPartitioner" or len(different) < len(ids):
        width = max(2, len(str(len(found) - 1)))
        names = [f"client-{number:0{width}}" for number in range(len(found))]
    return dict(zip(names, found, strict=True))


def _prefixes(groups: list[str | None], column: str | None) -> dict[str | None, str]:
    """The start of the clients' names for each group: what does not fit a file name becomes "-"."""
    prefixes: dict[str | None, str] = {}
    for group in groups:
        prefix = "client" if group is None else _letters(group)
        if not prefix or prefix.casefold() in (other.casefold() for other in prefixes.values()):
            raise DataError(
                f"the group {group!r} of the column {column!r} cannot name its clients: its "
                "letters and digits are none or those of another group; rename it in the data"
            )
        prefixes[group] = prefix
    return prefixes


def _letters(group: str) -> str:
    """A group's name with "-" for what is neither a letter nor a digit of any script."""
    composed = unicodedata.normalize("NFC", group)
    kept = [sign if is_letter(sign) or sign in "._" else " " for sign in composed]
    return "-".join("".join(kept).split()).strip("-._")[:48]


def _parts(
    table: Table,
    job: Job,
    maker: Any,
    options: Plain,
    group: str | None,
    numbers: list[int],
    clients: int | None,
) -> list[list[int]]:
    """Row numbers by client for one group; ``clients`` is None where the data decide how many there
    are.
    """
    where = ""
    if group is not None:
        where = f" in the group {group!r}"
    if clients is not None and len(numbers) < clients:
        raise DataError(
            f"there are {len(numbers)} rows for {clients} clients{where}; lower federation.clients"
        )
    taken = inspect.signature(maker).parameters
    arguments = dict(options)
    if "num_partitions" in taken:
        arguments["num_partitions"] = clients
    if "seed" in taken:
        arguments["seed"] = derive(job.run.seed, "partition", maker.__name__, group)
    # several partitioners cut the rows in the order they stand in
    order = numpy_rng(job.run.seed, "partition order", group).permutation(numbers).tolist()
    columns = {"row": order} | _columns(table, maker, options, order)
    try:
        parts = _run(maker, arguments, columns)
    except Exception as error:  # the library checks late, with many kinds of them
        message = " ".join(str(error).split()) or type(error).__name__
        least = options.get(_MINIMUM)
        if _MINIMUM in taken and _MINIMUM not in options:
            least = taken[_MINIMUM].default
        if "number of attempts" in message and least:
            raise JobError(
                f"data.partition: no draw gave each of {clients} clients {least} of {len(numbers)} "
                f"rows{where}; lower "
                f"federation.clients or data.partition.options.{_MINIMUM}, or raise "
                f"data.partition.options.alpha"
            ) from error
        blamed = _blamed(message, options, job)
        raise JobError(f"{blamed} does not work{where}: {message[:300]}") from error
    if clients is not None and len(parts) != clients:
        raise JobError(
            f"data.partition.options makes {len(parts)} clients{where} where federation.clients "
            f"asks for {clients}; "
            "make them agree"
        )
    return [sorted(rows) for rows in parts]


def _blamed(
    message: str,
    options: Plain,
    job: Job,
) -> str:
    """The option that the library's message speaks of, else the way to split itself."""
    said = message.lower().replace("_", " ")
    for key, value in options.items():
        if key.replace("_", " ") in said:
            return f"data.partition.options.{key} = {value!r}"
    return f'data.partition.by = "{job.data.partition.by}"'


def _columns(
    table: Table,
    maker: Any,
    options: Plain,
    order: list[int],
) -> dict[str, list[Any]]:
    by = options.get("partition_by")
    if by is None:
        return {}
    values = [table.columns[by][row] for row in order]
    if maker.__name__ != "ContinuousPartitioner":
        # one of the others works with class numbers alone, and numbers do for all of them
        known = sorted(set(values), key=lambda value: (type(value).__name__, value))
        numbers = {value: number for number, value in enumerate(known)}
        values = [numbers[value] for value in values]
    return {by: values}


def _run(
    maker: Any,
    arguments: Plain,
    columns: dict[str, list[Any]],
) -> list[list[int]]:
    import datasets

    # retries and unused classes are warned about, one partitioner draws a progress bar: what
    # matters is checked after
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        partitioner = maker(**arguments)
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        return [partitioner.load_partition(i)[:]["row"] for i in range(partitioner.num_partitions)]


def _partitioner(job: Job, table: Table) -> tuple[Any, Plain]:
    """The partitioner's class and its complete options."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    import flwr_datasets.partitioner as library

    by, given = job.data.partition.by, job.data.partition.options
    name, defaults = ALIASES.get(by, (by, {}))
    usable = [
        known
        for known in library.__all__
        if not known.startswith(("Partitioner", "Vertical", "IdToSizeFnc"))
    ]
    if name not in usable:
        near = difflib.get_close_matches(by, [*ALIASES, *usable], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise JobError(
            f"data.partition.by = {by!r} is no way to split rows; {hint}there are: "
            f"{', '.join(ALIASES)}"
        )
    maker = getattr(library, name)
    taken = inspect.signature(maker).parameters
    for key, value in given.items():
        if key in OURS:
            raise JobError(
                f"data.partition.options.{key} = {value!r} is not set here: {OURS[key]} decides it"
            )
        if key not in taken:
            own = ", ".join(known for known in taken if known not in OURS) or "none"
            raise JobError(
                f"data.partition.options.{key} = {value!r} is no option of {name}; its options: "
                f"{own}"
            )
    options = defaults | given
    if "partition_by" in taken and "partition_by" not in options:
        # natural partitioners go by the column of client ids, the others by the label
        labelled = task_class(job.data).classifies
        if name not in NATURAL and not labelled:
            raise JobError(
                f'data.partition.by = "{by}" goes by labels, which this task does not have; set it '
                f'to "iid" or '
                '"natural", or name a column of the data in data.partition.options.partition_by'
            )
        by_column = table.group if name in NATURAL else _label_column(job, table)
        if by_column is not None:
            options["partition_by"] = by_column
    for key, parameter in taken.items():
        if key not in options and key not in OURS and parameter.default is inspect.Parameter.empty:
            raise JobError(f"data.partition.options.{key} is not set, and {name} needs it")
    if "distribution_array" in options:
        options["distribution_array"] = numpy.asarray(options["distribution_array"])
    return maker, options


def _label_column(job: Job, table: Table) -> str | None:
    """The column of the labels, or of their sets; None where the task has none."""
    if CLASSES in table.columns:
        return CLASSES
    label: str | None = getattr(job.data, "label", None)
    return label
