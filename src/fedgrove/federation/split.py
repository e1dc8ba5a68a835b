"""Divides one client's rows into training, test and validation, once and seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedgrove.federation.purposes import TEST, TRAIN, VALIDATION
from fedgrove.federation.readers import Row
from fedgrove.ground.errors import DataError
from fedgrove.ground.seeds import numpy_rng

if TYPE_CHECKING:
    from fedgrove.federation.load import Holding
    from fedgrove.job import DataSection


@dataclass(frozen=True)
class Parts:
    train: list[Row]
    test: list[Row]
    validation: list[Row]


def divided(
    client: str,
    holding: Holding,
    data: DataSection,
    seed: int,
) -> Parts:
    """What a client holds, as the job divides it."""
    return split(
        client,
        holding.rows,
        seed=seed,
        test_fraction=data.test_fraction,
        validation_fraction=data.validation_fraction,
        train_examples=data.train_examples,
        test_examples=data.test_examples,
        purposes=holding.purposes,
    )


def split(
    client: str,
    rows: list[Row],
    *,
    seed: int,
    test_fraction: float,
    validation_fraction: float = 0.0,
    train_examples: int | None = None,
    test_examples: int | None = None,
    purposes: Sequence[str] | None = None,
) -> Parts:
    """Test and validation rows drawn by label as far as possible, each label keeping a row for
    training; then the caps.

    At least one row goes to test (and to validation, if its share is not 0) and one stays for
    training. What the caps leave over is not used. Rows keep their order. Where the data say what
    each row is for (``purposes``: "train", "test", "validation"), nothing is drawn but a validation
    that they lack. Raises DataError where there are too few.
    """
    deal = _Deal(rows, numpy_rng(seed, "split", client))
    if purposes is None:
        parts = _drawn(client, deal, test_fraction, validation_fraction)
    else:
        parts = _given(client, deal, purposes, validation_fraction)
    train, test, validation = parts
    if train_examples is not None:
        train = deal.draw(train, min(train_examples, len(train)), cover=True)
    if test_examples is not None:
        test = deal.draw(test, min(test_examples, len(test)))
    return Parts(
        train=[rows[i] for i in train],
        test=[rows[i] for i in test],
        validation=[rows[i] for i in validation],
    )


@dataclass(frozen=True)
class _Deal:
    """Draws row numbers by label."""

    rows: list[Row]
    rng: np.random.Generator

    def draw(
        self,
        pool: list[int],
        size: int,
        *,
        leave: int = 0,
        cover: bool = False,
    ) -> list[int]:
        """``size`` of the pool's numbers, in order; ``leave`` and ``cover`` as in ``apportion``."""
        members: dict[str, list[int]] = {}
        for row in pool:
            members.setdefault(self.rows[row]["label"], []).append(row)
        counts = {label: len(members[label]) for label in sorted(members)}
        drawn: list[int] = []
        shares = apportion(counts, size, leave=leave, cover=cover)
        for label, share in shares.items():
            order = self.rng.permutation(members[label])
            drawn += map(int, order[:share])
        return sorted(drawn)


Numbers = tuple[list[int], list[int], list[int]]  # for training, test and validation


def _drawn(
    client: str,
    deal: _Deal,
    test_fraction: float,
    validation_fraction: float,
) -> Numbers:
    count = len(deal.rows)
    needed = 2 + (validation_fraction > 0)
    if count < needed:
        what = "training and test"
        if needed == 3:
            what = "training, test and validation"
        raise DataError(
            f"the client {client!r} has {count} row{'s' * (count != 1)} and needs at least "
            f"{needed} for {what}; give it more rows, or use fewer clients or another "
            "data.partition"
        )
    validation_size = min(_share(count, validation_fraction), count - 2)
    test_size = min(_share(count, test_fraction), count - 1 - validation_size)
    test = deal.draw(list(range(count)), test_size, leave=1)
    pool = sorted(set(range(count)) - set(test))
    validation = deal.draw(pool, validation_size, leave=1)
    return sorted(set(pool) - set(validation)), test, validation


def _given(
    client: str,
    deal: _Deal,
    purposes: Sequence[str],
    validation_fraction: float,
) -> Numbers:
    held: dict[str, list[int]] = {TRAIN: [], TEST: [], VALIDATION: []}
    for row, purpose in enumerate(purposes):
        held[purpose].append(row)
    train, validation = held[TRAIN], held[VALIDATION]
    if not validation and validation_fraction:
        size = min(_share(len(train), validation_fraction), len(train) - 1)
        validation = deal.draw(train, size)
        train = sorted(set(train) - set(validation))
    for purpose, numbers in ((TRAIN, train), (TEST, held[TEST])):
        if not numbers:
            raise DataError(
                f"the client {client!r} has no rows for {purpose}; mark or add some, use fewer "
                "clients, or leave out data.split so that they are drawn"
            )
    return train, held[TEST], validation


def _share(count: int, fraction: float) -> int:
    if fraction <= 0:
        return 0
    return max(1, round(count * fraction))


def apportion(
    counts: Mapping[str, int],
    size: int,
    *,
    leave: int = 0,
    cover: bool = False,
) -> dict[str, int]:
    """How many of ``size`` go to each label, in proportion to its count (largest remainders, ties
    by label).

    ``leave``: that many of each label are not taken, unless ``size`` cannot be reached otherwise;
    ``cover``: each label gets one first, as far as ``size`` reaches (the most frequent first).
    ``size`` is at most the sum of the counts.
    """
    shares = dict.fromkeys(counts, 0)
    if cover:
        for label in sorted(counts, key=lambda label: (-counts[label], label))[:size]:
            shares[label] = 1
    room = {label: max(0, counts[label] - leave - shares[label]) for label in counts}
    if sum(room.values()) < size - sum(shares.values()):
        room = {label: counts[label] - shares[label] for label in counts}
    missing = size - sum(shares.values())
    total = sum(counts.values())
    quotas = {label: missing * counts[label] / total for label in counts}
    extra = {label: min(room[label], int(np.floor(quotas[label]))) for label in counts}
    # one by one to the label that is furthest behind its quota and has room
    while sum(extra.values()) < missing:
        able = [label for label in counts if extra[label] < room[label]]
        behind = min(able, key=lambda label: (extra[label] - quotas[label], label))
        extra[behind] += 1
    return {label: shares[label] + extra[label] for label in counts}
