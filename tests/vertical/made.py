"""Small tables of parties, made on the spot: labels that need all columns, one column of noise."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgrove.vertical.job import VerticalJob

ROWS = 60


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    draw = random.Random(3)
    found = []
    for number in range(count):
        a, b, noise = draw.gauss(0, 1), draw.gauss(0, 1), draw.gauss(0, 1)
        label = "ill" if a + b + 0.2 * draw.gauss(0, 1) > 0 else "well"
        found.append({"id": f"p{number}", "a": a, "b": b, "n": noise, "label": label})
    return found


def save(path: Path, table: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)


def save_parties(folder: Path, table: Sequence[dict[str, Any]] | None = None) -> None:
    table = table or rows()
    save(folder / "clinic.csv", table, ["id", "a", "label"])
    save(folder / "lab.csv", table, ["id", "b"])
    save(folder / "other.csv", table, ["id", "n"])


def values(**changes: dict[str, Any]) -> dict[str, Any]:
    """A job over the three tables, as plain data."""
    found: dict[str, Any] = {
        "data": {"id": "id", "labels": "clinic", "test": 0.25},
        "train": {"epochs": 3, "batch_size": 16},
        "party": {
            "clinic": {"path": "clinic.csv", "columns": ["a"], "width": 4},
            "lab": {"path": "lab.csv", "columns": ["b"], "width": 4},
            "other": {"path": "other.csv", "columns": ["n"], "width": 4},
        },
    }
    for section, keys in changes.items():
        found.setdefault(section, {}).update(keys)
    return found


def job(folder: Path, **changes: dict[str, Any]) -> VerticalJob:
    return VerticalJob.build(values(**changes), folder=folder)
