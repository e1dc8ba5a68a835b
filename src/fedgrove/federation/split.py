"""Divides one client's rows into training, test and validation, once and seeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedgrove.federation.readers import Row
from fedgrove.ground.errors import DataError
from fedgrove.ground.seeds import numpy_rng


@dataclass(frozen=True)
class Parts:
    train: list[Row]
    test: list[Row]
    validation: list[Row]


def split(
    client: str,
    rows: list[Row],
    *,
    seed: int,
    test_fraction: float,
    validation_fraction: float = 0.0,
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> Parts:
    """Test and validation rows drawn by label as far as possible, each label keeping a row for
    training; then the caps.

    At least one row goes to test (and to validation, if its share is not 0) and one stays for
    training. What the caps leave over is not used. Rows keep their order. Raises DataError where
    there are too few.
    """
    needed = 2 + (validation_fraction > 0)
    if len(rows) < needed:
        purposes = "training, test and validation" if needed == 3 else "training and test"
        raise DataError(
            f"the client {client!r} has {len(rows)} row{'s' * (len(rows) != 1)} and needs at least "
            f"{needed} for "
            f"{purposes}; give it more rows, or use fewer clients or another data.partition"
        )
    rng = numpy_rng(seed, "split", client)
    validation_size = (
        max(1, round(len(rows) * validation_fraction)) if validation_fraction > 0 else 0
    )
    validation_size = min(validation_size, len(rows) - 2)
    test_size = min(max(1, round(len(rows) * test_fraction)), len(rows) - 1 - validation_size)

    def draw(pool: list[int], size: int, *, leave: int = 0, cover: bool = False) -> list[int]:
        members: dict[str, list[int]] = {}
        for row in pool:
            members.setdefault(rows[row]["label"], []).append(row)
        counts = {label: len(members[label]) for label in sorted(members)}
        shares = apportion(counts, size, leave=leave, cover=cover)
        return sorted(
            int(row)
            for label, share in shares.items()
            for row in rng.permutation(members[label])[:share]
        )

    pool = list(range(len(rows)))
    test = draw(pool, test_size, leave=1)
    pool = sorted(set(pool) - set(test))
    validation = draw(pool, validation_size, leave=1)
    train = sorted(set(pool) - set(validation))
    if train_examples is not None:
        train = draw(train, min(train_examples, len(train)), cover=True)
    if test_examples is not None:
        test = draw(test, min(test_examples, len(test)))
    return Parts(*([rows[i] for i in part] for part in (train, test, validation)))


def apportion(
    counts: Mapping[str, int], size: int, *, leave: int = 0, cover: bool = False
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
        label = min(
            (x for x in counts if extra[x] < room[x]), key=lambda x: (extra[x] - quotas[x], x)
        )
        extra[label] += 1
    return {label: shares[label] + extra[label] for label in counts}
