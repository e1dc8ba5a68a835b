"""The federation: its clients, what each of them holds, and who never trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedgrove.federation.load import Holding, Silos, Table, load
from fedgrove.federation.partition import partition
from fedgrove.federation.readers import Row
from fedgrove.federation.split import divided
from fedgrove.federation.tasks import ClassifyText, Task, task_class
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.plain import Plain
from fedgrove.ground.seeds import numpy_rng

if TYPE_CHECKING:
    from fedgrove.job import Job


@dataclass(frozen=True)
class Client:
    """One client's rows, as the task reads them. A held-out client never takes part in training."""

    name: str
    train: list[Row]
    test: list[Row]
    validation: list[Row]
    group: str | None
    held_out: bool
    kinds: Mapping[str, int] = field(
        default_factory=dict
    )  # of its training rows, where rows have kinds and no labels


@dataclass(frozen=True)
class Federation:
    """Clients by name; the labels in the order of the head's outputs; ``source`` says where the
    data come from.
    """

    clients: tuple[Client, ...]
    labels: tuple[str, ...]
    source: Plain
    task: type[Task] = ClassifyText
    kind: str = ""  # the column that clients' kinds are values of
    remarks: tuple[str, ...] = ()  # what a user may want to know of how the data were read

    @property
    def training(self) -> tuple[Client, ...]:
        return tuple(client for client in self.clients if not client.held_out)

    @property
    def held_out(self) -> tuple[Client, ...]:
        return tuple(client for client in self.clients if client.held_out)

    def table(self) -> Plain:
        """Who holds what, as plain data: by client its counts and, of its training rows, labels and
        median words.

        ``kinds``: the values of the column by which texts without labels were split, "tasks" for
        instance.
        """
        kinds: set[str] = set()
        for client in self.clients:
            kinds.update(client.kinds)
        ordered = sorted(kinds)
        found: Plain = {"labels": list(self.labels)}
        if ordered:
            found["kind"] = self.kind
            found["kinds"] = ordered
        found["clients"] = [self._held_by(client, ordered) for client in self.clients]
        return found

    def _held_by(self, client: Client, kinds: Sequence[str]) -> Plain:
        """A client's part of the table."""
        counts = Counter(_classes_in(client.train, self.task))
        found: Plain = {
            "name": client.name,
            "group": client.group,
            "held_out": client.held_out,
            "train": len(client.train),
            "test": len(client.test),
            "validation": len(client.validation),
            "labels": {label: counts[label] for label in self.labels},
        }
        if kinds:
            found["kinds"] = {kind: client.kinds.get(kind, 0) for kind in kinds}
        return found | self.task.describe(client.train)


def build(job: Job) -> Federation:
    """The federation that ``job.data`` and ``job.federation`` describe; ``job.run.seed`` decides
    every draw.

    The same job gives the same federation, whatever order files or clients come in. Raises
    DataError (what is wrong with the data, and where) or JobError (which key, which value).
    """
    loaded = load(job)
    kind, kind_of = _kinds(loaded, job)
    clients = []
    for name, holding in sorted(_holdings(loaded, job).items()):
        parts = divided(name, holding, job.data, job.run.seed)
        kinds: Mapping[str, int] = {}
        if kind_of:
            kinds = Counter(kind_of[id(row)] for row in parts.train)
        clients.append(
            Client(
                name,
                parts.train,
                parts.test,
                parts.validation,
                holding.group,
                held_out=False,
                kinds=kinds,
            )
        )
    chosen = _held_out(clients, job)
    clients = [replace(client, held_out=client.name in chosen) for client in clients]
    task = task_class(job.data)
    labels: tuple[str, ...] = ()
    if task.classifies:
        labels = _labels(clients, loaded, job)
    remarks = tuple(loaded.remarks)
    return Federation(tuple(clients), labels, loaded.source, task, kind, remarks)


def _holdings(loaded: Table | Silos, job: Job) -> dict[str, Holding]:
    """The rows of each client."""
    found: dict[str, Holding] = {}
    if isinstance(loaded, Silos):
        for name, rows in loaded.clients.items():
            found[name] = Holding(rows, loaded.purposes.get(name), loaded.groups[name])
        return found
    for name, (numbers, group) in partition(loaded, job).items():
        rows = [loaded.rows[number] for number in numbers]
        own = None
        if loaded.purposes is not None:
            own = [loaded.purposes[number] for number in numbers]
        found[name] = Holding(rows, own, group)
    return found


def _kinds(loaded: Table | Silos, job: Job) -> tuple[str, dict[int, str]]:
    """The column whose values clients mix, and by ``id`` of a row its value; nothing where rows
    have labels.
    """
    column = job.data.partition.options.get("partition_by")
    by_labels = task_class(job.data).classifies
    by_names = job.data.partition.by == "natural"
    if by_labels or by_names or isinstance(loaded, Silos) or column not in loaded.columns:
        return "", {}
    found: dict[int, str] = {}
    for row, kind in zip(loaded.rows, loaded.columns[column], strict=True):
        found[id(row)] = str(kind)
    return column, found


def _held_out(clients: Sequence[Client], job: Job) -> set[str]:
    """The clients kept out of training: those named, or a seeded draw that leaves every label to
    someone who trains.
    """
    wanted = job.federation.held_out
    names = [client.name for client in clients]
    if isinstance(wanted, Sequence):
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise JobError(
                f"federation.held_out names {unknown[0]!r}, which is no client; there are: "
                f"{', '.join(names)}"
            )
        chosen = set(wanted)
    else:
        size = 0
        if wanted > 0:
            size = max(1, round(wanted * len(names)))
        if size < len(names):
            chosen = _draw(clients, size, job)
        else:
            chosen = set(names)
    if len(chosen) == len(names):
        raise JobError(
            f"federation.held_out = {wanted!r} leaves no client to train; hold out fewer"
        )
    return chosen


def _draw(
    clients: Sequence[Client],
    size: int,
    job: Job,
) -> set[str]:
    task = task_class(job.data)
    held = [set(_classes_in(client.train, task)) for client in clients]
    everywhere: Counter[str] = Counter()
    for own in held:
        everywhere.update(own)
    chosen: set[str] = set()
    for number in numpy_rng(job.run.seed, "held out").permutation(len(clients)):
        own = held[number]
        if len(chosen) < size and all(everywhere[label] > 1 for label in own):
            chosen.add(clients[number].name)
            everywhere.subtract(own)
    if len(chosen) < size:
        raise JobError(
            f"federation.held_out = {job.federation.held_out!r} would hold out {size} clients, but "
            f"after {len(chosen)} "
            "every other one is the only one left with some label; hold out fewer, or name them"
        )
    return chosen


def _labels(
    clients: Sequence[Client],
    loaded: Table | Silos,
    job: Job,
) -> tuple[str, ...]:
    """The classes in the order of the head's outputs: all that the data have, also those of rows
    that nobody uses.
    """
    if job.data.classes:  # the user's word that these are the classes, trained or not
        return job.data.classes
    task = task_class(job.data)
    trained: set[str] = set()
    for client in clients:
        if not client.held_out:
            trained.update(_classes_in(client.train, task))
    for client in clients:
        rows = (*client.test, *client.validation, *client.train)
        for label in _classes_in(rows, task):
            if label not in trained:
                raise DataError(
                    f"the label {label!r} of the client {client.name!r} occurs only in "
                    f"test, validation or "
                    "held-out rows, so nobody would learn it; give it more rows "
                    "(data.test_fraction, "
                    "data.train_examples), remove it, or list all labels in data.labels"
                )
    if not trained:
        raise DataError("no training row has a label, so there is nothing to learn")
    if len(trained) < 2 and not task.several:
        raise DataError(
            f"all training rows have the one label {min(trained)!r}; to classify takes two or more"
        )
    present = set(_classes_in(loaded.every_row(), task))
    labels = tuple(sorted(trained | present, key=_natural_order))
    _refuse_unordered(labels, job)
    spelt: dict[str, str] = {}
    for label in labels:
        other = spelt.setdefault(label.casefold(), label)
        if other != label:
            raise DataError(
                f"the labels {other!r} and {label!r} differ in case alone; spell them alike, or "
                f"list all labels in "
                "data.labels if they are two"
            )
    return labels


def _classes_in(rows: Iterable[Row], task: type[Task]) -> Iterator[str]:
    for row in rows:
        yield from task.classes_in(row)


def _refuse_unordered(labels: Sequence[str], job: Job) -> None:
    """Steps that are no numbers have no order of their own."""
    if getattr(job.data, "ordinal", False) and any(_natural_order(each)[0] for each in labels):
        raise DataError(
            f"data.ordinal = true, but the labels {', '.join(map(repr, labels[:4]))} have no order "
            "of their own; list them from the first step to the last in data.labels"
        )


def _natural_order(label: str) -> tuple[bool, int, str]:
    number = label.isascii() and label.lstrip("-").isdigit()
    return not number, int(label) if number else 0, label
