"""The parties' tables, read, checked and joined."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedgrove.federation.readers import Place, Values, label_of, records, text_of
from fedgrove.ground.errors import DataError
from fedgrove.ground.seeds import derive, numpy_rng
from fedgrove.ground.toml import shown
from fedgrove.vertical.job import PartySection, VerticalJob
from fedgrove.vertical.join import Ids, Joined, by_row, hashes, join

_SHORTEST = 16  # bytes of a key
_MOST = 100  # classes


@dataclass(frozen=True)
class Table:
    """One party's rows and where each stands."""

    places: Sequence[Place]
    rows: Sequence[Values]

    def part(self, chosen: Sequence[int]) -> Table:
        """Those rows, in the given order."""
        places = [self.places[row] for row in chosen]
        return Table(places, [self.rows[row] for row in chosen])


@dataclass(frozen=True, eq=False)
class Entities:
    """The joined entities: n of them, in one order at all parties."""

    joined: Joined
    tables: Mapping[str, Table]  # each party's rows in the entities' order
    labels: Int[Tensor, " n"]
    classes: Sequence[str]
    train: Sequence[int]  # which are learnt from, in the order of the batches
    test: Sequence[int]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that is learnt from and tested on."""
        rows = {name: list(own.rows) for name, own in self.tables.items()}
        whole = [rows, self.labels.tolist(), list(self.classes)]
        text = json.dumps(whole, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def majority(self) -> float:
        """The accuracy on the test entities of always saying the training entities' largest class."""
        counts = torch.bincount(self.labels[list(self.train)])
        right = self.labels[list(self.test)] == counts.argmax()
        return float(right.double().mean())


def entities(job: VerticalJob) -> Entities:
    """Raises ``DataError`` for tables that cannot be joined or learnt from."""
    data = job.settings.data
    tables = {name: _table(job, name) for name in job.parties}
    joined = _joined(job, tables)
    ordered = {name: table.part(joined.rows[name]) for name, table in tables.items()}
    named = _labels(job, ordered[data.labels])
    classes = sorted(set(named))
    labels = torch.tensor([classes.index(label) for label in named])
    train, test = _split(job, len(named))
    _refuse_unfit(job, classes, labels[train])
    return Entities(joined, ordered, labels, classes, train, test)


def numbers(
    name: str,
    section: PartySection,
    table: Table,
) -> Float[Tensor, "n columns"]:
    """A party's columns of numbers in float64. Raises ``DataError`` for what is none."""
    found: list[list[float]] = []
    for place, values in zip(table.places, table.rows, strict=True):
        numbers_of_row = []
        for column in section.columns or ():
            number = _number(values[column])
            if number is None:
                raise DataError(
                    f"party {shown(name)}: {place}: the column {shown(column)} has "
                    f"{shown(values[column])}, which is no finite number; fill it in, or leave the column "
                    f"out of party.{name}.columns."
                )
            numbers_of_row.append(number)
        found.append(numbers_of_row)
    return torch.tensor(found, dtype=torch.float64)


def _number(value: object) -> float | None:
    """A finite number; None for anything else."""
    if not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if math.isfinite(number):
        return number
    return None


def texts(
    name: str,
    section: PartySection,
    table: Table,
) -> list[Values]:
    """A party's texts as rows of the text task. Raises ``DataError`` where one is empty."""
    column = section.text or ""
    found: list[Values] = []
    for place, values in zip(table.places, table.rows, strict=True):
        text = text_of(values[column], column, f"party {shown(name)}: {place}")
        found.append({"text": text})
    return found


def _table(job: VerticalJob, name: str) -> Table:
    section = job.parties[name]
    data = job.settings.data
    wanted = [*(section.columns or ())]
    if section.text is not None:
        wanted.append(section.text)
    if data.id is not None:
        wanted.append(data.id)
    if name == data.labels:
        wanted.append(data.label)
    path = job.place(section.path)
    try:
        found = list(records(path, wanted))
    except DataError as error:
        raise DataError(f"party {shown(name)}: {error}") from error
    if not found:
        raise DataError(f"party {shown(name)}: {path} has no rows.")
    places, rows = zip(*found, strict=True)
    return Table(places, rows)


def _joined(job: VerticalJob, tables: Mapping[str, Table]) -> Joined:
    key = _key(job)
    column = job.settings.data.id
    if column is None:
        sent = by_row({name: len(table.rows) for name, table in tables.items()}, key)
    else:
        sent = {
            name: hashes(name, _ids(name, table, column), key) for name, table in tables.items()
        }
    return join(sent, drop=job.settings.data.unmatched == "drop")


def _ids(name: str, table: Table, column: str) -> Ids:
    try:
        pairs = zip(table.rows, table.places, strict=True)
        ids = [label_of(values[column], column, place) for values, place in pairs]
    except DataError as error:
        raise DataError(f"party {shown(name)}: an entity without an id: {error}") from error
    return Ids(ids, table.places)


def _labels(job: VerticalJob, table: Table) -> list[str]:
    column = job.settings.data.label
    pairs = zip(table.rows, table.places, strict=True)
    return [label_of(values[column], column, place) for values, place in pairs]


def _split(job: VerticalJob, count: int) -> tuple[list[int], list[int]]:
    """(train, test) of the entities, shuffled by the seed."""
    run = job.settings.run
    order = numpy_rng(run.seed, "entities").permutation(count).tolist()
    kept = round(job.settings.data.test * count)
    if kept == 0 or kept == count:
        raise DataError(
            f"{count} entities leave none to learn from, or none to test on, with data.test = "
            f"{job.settings.data.test:g}; join more of them, or change it."
        )
    return order[kept:], order[:kept]


def _refuse_unfit(job: VerticalJob, classes: Sequence[str], train: Int[Tensor, " n"]) -> None:
    label = shown(job.settings.data.label)
    if len(classes) > _MOST:
        raise DataError(
            f"The labels in {label} have {len(classes)} different values; a vertical run learns "
            f"classes, at most {_MOST} of them."
        )
    if len(train.unique()) < 2:
        raise DataError(
            f"The labels in {label} have one value in all training entities; there is nothing to learn."
        )


def _key(job: VerticalJob) -> bytes:
    """The key that ids are hashed with."""
    path = job.settings.data.key
    if path is None:
        return derive(job.settings.run.seed, "ids").to_bytes(8, "big") * 2
    place: Path = job.place(path)
    try:
        key = place.read_bytes().strip()
    except OSError as error:
        raise DataError(f"data.key: {place} cannot be read ({error.strerror or error}).") from None
    if len(key) < _SHORTEST:
        raise DataError(
            f"data.key: {place} has {len(key)} bytes; ids need a key of {_SHORTEST} or more, the same "
            f"at all parties."
        )
    return key
