"""The clients in numbers: each of them, by group, and as quantiles where they are many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedgrove.ground import words
from fedgrove.ground.statistics import mean, percentiles, tail10
from fedgrove.report.compare import Comparison, Row
from fedgrove.report.data import Run

WHOLE = 200  # clients that all stand in the table; of more the weakest do, and the rest is searched
WEAKEST = 100
CROWD = 40  # more clients than this are shown as quantiles too
GROUPS = 60  # more groups than this are no overview
SHARES = {
    "worst": 0,
    "5 %": 5,
    "25 %": 25,
    "median": 50,
    "75 %": 75,
    "95 %": 95,
    "best": 100,
}

Grid = list[list[str]]  # the first row is the header


@dataclass(frozen=True)
class ClientTable:
    """The table of all clients. ``rows`` stand in the page; ``data`` has all of them as JSON that
    is safe in a script element, "" where the rows are all there is.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    clients: int
    data: str


def table(run: Run, comparison: Comparison) -> ClientTable:
    """Every client in the order of the names; of very many those that fare worst."""
    gains = comparison.gains()
    alone = None
    if comparison.local:
        alone = comparison.local.values
    headings = ["client", "group", "examples", "rank", "base"]
    if alone is not None:
        headings.append("alone")
    headings += [run.metric, "tuned", "gain", "test loss"]
    everyone = sorted(run.summary["clients"])
    lines = {name: _line(run, name, alone, gains) for name in everyone}
    if len(everyone) <= WHOLE:
        return ClientTable(
            headings,
            list(lines.values()),
            len(everyone),
            "",
        )
    ours = comparison.ours.values
    by_score = sorted(ours, key=lambda name: (ours[name], name))
    weakest = by_score or everyone
    shown = [lines[name] for name in weakest[:WEAKEST]]
    data = json.dumps(list(lines.values()), ensure_ascii=False, separators=(",", ":"))
    safe = data.replace("<", "\\u003c")
    return ClientTable(headings, shown, len(everyone), safe)


def _line(
    run: Run,
    name: str,
    alone: Mapping[str, float] | None,
    gains: Mapping[str, float],
) -> list[str]:
    row = run.summary["clients"][name]
    called = name
    if row.get("held_out"):
        called = f"{name} (never trained)"
    group = run.described(name).get("group") or ""
    cells = [
        called,
        str(group),
        _whole(row.get("examples")),
        _whole(row.get("rank")),
        _score(run, row.get("metric_base")),
    ]
    if alone is not None:
        cells.append(_score(run, alone.get(name)))
    gain = words.change(gains.get(name), percent=run.percent)
    loss = words.number(row.get("loss"))
    cells += [
        _score(run, row.get("metric")),
        _score(run, row.get("metric_tuned")),
        words.typographic(gain),
        words.typographic(loss),
    ]
    return cells


def quantiles(run: Run, comparison: Comparison) -> Grid:
    """The clients of each row of the comparison from the worst to the best; [] for few clients."""
    if len(comparison.ours.values) <= CROWD:
        return []
    header = ["", *(words.typographic(name) for name in SHARES)]
    rows = [_quantile_row(run, row) for row in comparison.rows]
    return [header, *rows]


def _quantile_row(run: Run, row: Row) -> list[str]:
    found = percentiles(row.values.values(), list(SHARES.values()))
    cells = [_score(run, value) for value in found]
    return [row.label, *cells]


def groups(run: Run, comparison: Comparison) -> Grid:
    """Mean, tail, worst and gain of each natural group of clients; [] without groups."""
    ours = comparison.ours.values
    gains = comparison.gains()
    members: dict[str, list[str]] = {}
    for name in ours:
        group = run.described(name).get("group") or ""
        mates = members.setdefault(str(group), [])
        mates.append(name)
    if not 2 <= len(members) <= GROUPS:
        return []
    rows = [["group", "clients", "base", "mean", "tail", "worst", "mean gain"]]
    for group, names in sorted(members.items()):
        values = [ours[name] for name in names]
        base = mean(comparison.base.values.get(name) for name in names)
        gain = mean(gains.get(name) for name in names)
        change = words.change(gain, percent=run.percent)
        row = [
            group or "none",
            f"{len(names):,}",
            _score(run, base),
            _score(run, mean(values)),
            _score(run, tail10(values)),
            _score(run, min(values)),
            words.typographic(change),
        ]
        rows.append(row)
    return rows


def _score(run: Run, value: float | None) -> str:
    return words.typographic(words.score(value, percent=run.percent))


def _whole(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}"
