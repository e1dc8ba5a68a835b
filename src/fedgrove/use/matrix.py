"""How each client's model does on each client's test data: who is served by whose model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedgrove.ground.errors import RunError
from fedgrove.ground.files import write_json, write_text
from fedgrove.ground.plain import Plain
from fedgrove.use.predictions import table
from fedgrove.use.result import Result

FILE = "matrix"  # .json and .csv, in the run's directory
Matrix = dict[str, dict[str, Plain]]  # model -> whose test data -> measures


def matrix(result: Result, advance: Callable[[str], None] = lambda _: None) -> Matrix:
    """Every model of a run, the common one included, on every client's test rows; ``advance`` hears
    each model's name when it is done.
    """
    tests, more = result.tests, result.job.data.metrics
    found: Matrix = {}
    for name in result.answering():
        model = result.client(name).model()
        row: dict[str, Plain] = {}
        for client, rows in tests.items():
            row[client] = model.measures(rows, more)
        found[name] = row
        advance(name)
    return found


def grid(found: Matrix, metric: str) -> list[list[str]]:
    """The table of one measure: a row for each model, a column for each client's data. Raises
    ``RunError`` for a measure that is not there or is no number.
    """
    row = next(iter(found.values()))
    first = next(iter(row.values()))
    known = [key for key, value in first.items() if not isinstance(value, Mapping)]
    if metric not in known:
        raise RunError(
            f"--metrics: there is no measure {metric!r}; choose from {', '.join(known)}."
        )
    lines: list[list[str]] = []
    for name, row in found.items():
        figures = [figure(measures[metric]) for measures in row.values()]
        lines.append([name, *figures])
    return lines


def figure(value: float | None) -> str:
    """A number in a table; "-" where it is not defined."""
    if value is None:
        return "-"
    return f"{value:.4g}"


def write(folder: Path, found: Matrix) -> tuple[Path, Path]:
    """``matrix.json`` (model, data, measures) and ``matrix.csv`` (a line for each pair)."""
    files = folder / f"{FILE}.json", folder / f"{FILE}.csv"
    write_json(files[0], found)
    lines: list[Plain] = []
    for model, row in found.items():
        for data, measures in row.items():
            line: Plain = {"model": model, "data": data}
            for key, value in measures.items():
                if not isinstance(value, Mapping):
                    line[key] = value
            lines.append(line)
    write_text(files[1], table(lines))
    return files
