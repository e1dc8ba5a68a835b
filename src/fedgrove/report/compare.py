"""The run against the untouched base, training alone and other runs: rows, gains and plain
sentences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedgrove.ground import words
from fedgrove.ground.statistics import mean, std, tail10
from fedgrove.report.data import Run


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a label and the values of the clients that trained in this
    run.
    """

    label: str
    values: Mapping[str, float]
    kind: str  # "base" | "local" | "other" | "ours" | "tuned" | "unseen": its colour
    note: str = ""

    @property
    def mean(self) -> float:
        return mean(self.values.values())

    @property
    def std(self) -> float:
        return std(self.values.values())

    @property
    def tail(self) -> float:
        return tail10(self.values.values())

    @property
    def worst(self) -> str:
        """The client with the lowest value."""
        return min(self.values, key=lambda name: (self.values[name], name), default="")


@dataclass(frozen=True)
class Comparison:
    """``rows`` as printed; ``local`` is the row of training alone where a baseline run gives it."""

    rows: tuple[Row, ...]
    ours: Row
    base: Row
    local: Row | None
    warnings: tuple[str, ...]  # why a baseline is not quite comparable

    @property
    def reference(self) -> Row | None:
        """What gains and losses are measured against: training alone, else another run, else the
        base, else None.
        """
        if self.local:
            others = [self.local]
        else:
            others = [row for row in self.rows if row.kind == "other"]
        return next((row for row in [*others, self.base] if row and row.values), None)

    def gains(self) -> dict[str, float]:
        """``{client: this run − reference}``, largest first; {} without a reference."""
        if self.reference:
            other = self.reference.values
        else:
            other = {}
        both = {
            name: value - other[name] for name, value in self.ours.values.items() if name in other
        }
        return dict(sorted(both.items(), key=lambda item: (-item[1], item[0])))


def compare(run: Run, baselines: Sequence[Run]) -> Comparison:
    """Rows over the clients of ``run``; a baseline without any of them gets a warning in place of a
    row.
    """
    base = Row("Untouched base, head only", run.values("metric_base"), "base")
    ours = Row(_label(run), run.values("metric"), "ours", "this run")
    rows, warnings, local = [base] if base.values else [], [], None
    for other in baselines:
        values = {
            name: value for name, value in other.values("metric").items() if name in run.clients
        }
        if not values:
            warnings.append(
                f"{other.path.name} has no client in common with this run, so it is not in the "
                f"table."
            )
            continue
        warnings += _differences(run, other, len(values))
        row = Row(_label(other), values, "local" if other.alone else "other", other.path.name)
        rows.append(row)
        if other.alone and local is None and not run.alone:
            local = row
    rows.append(ours)
    tuned = run.values("metric_tuned")
    if tuned:
        rows.append(Row("… then trained on at each client", tuned, "tuned"))
    return Comparison(tuple(rows), ours, base, local, tuple(warnings))


def _label(run: Run) -> str:
    if run.alone:
        return "Each client alone"
    return f"Together: {run.method}"


def unseen(run: Run) -> list[Row]:
    """The clients that never trained: as they arrive, and after local training where the run did
    it.
    """
    label = f"{words.count(len(run.newcomers), 'client')} that never trained"
    found = []
    for key, title in (("metric", label), ("metric_tuned", "… then trained on at each of them")):
        values = {
            name: row[key]
            for name, row in run.newcomers.items()
            if isinstance(row.get(key), int | float)
        }
        if values:
            found.append(Row(title, values, "unseen"))
    return found


def verdict(run: Run, comparison: Comparison) -> list[str]:
    """What came out, in sentences that are true whatever the numbers are."""
    ours, base, local, percent = comparison.ours, comparison.base, comparison.local, run.percent
    if not ours.values:
        return [
            f"No client has a {run.metric} at the end of the run, so there is nothing to compare."
        ]

    def shown(value: float) -> str:
        return words.typographic(words.score(value, percent=percent))

    said = []
    whose = "The client’s"
    if len(ours.values) > 1:
        whose = "The average client’s"
    if base.values:
        said.append(
            f"{whose} {run.metric} went from {shown(base.mean)} (untouched base) to "
            f"{shown(ours.mean)}."
        )
    else:
        said.append(f"{whose} {run.metric} is {shown(ours.mean)} at the end.")
    if local:
        average, weakest = (
            _effect(getattr(ours, what) - getattr(local, what), percent)
            for what in ("mean", "tail")
        )
        both = f"{average} on average and {weakest} for the weakest clients (tail)"
        if average == weakest:
            both = f"{average}, on average as for the weakest clients (tail)"
        said.append(f"Training alone reaches {shown(local.mean)}: taking part {both}.")
    elif run.alone:
        said.append("Nothing was exchanged: this is the run that others are to be compared with.")
    else:
        said.append(
            "Without a run in which every client trains alone beside it, this does not say "
            "whether taking part beats training alone."
        )
    gains = comparison.gains()
    reference = comparison.reference
    if reference and len(gains) > 1:
        better, worse = (
            sum(gain > 0 for gain in gains.values()),
            sum(gain < 0 for gain in gains.values()),
        )
        same = len(gains) - better - worse
        than = {"local": "than alone", "base": "than with the base"}.get(
            reference.kind, f"than in {reference.note}"
        )
        if same:
            unchanged = f", {same} unchanged"
        else:
            unchanged = ""
        if better == 1:
            are = "is"
        else:
            are = "are"
        said.append(
            f"{better:,} of {len(gains):,} clients {are} better off {than}, {worse:,} worse{unchanged}."
        )
    if run.newcomers:
        said.append(
            f"{words.count(len(run.newcomers), 'more client')} never trained and only tried the "
            f"result."
        )
    return said


def grain(run: Run) -> str:
    """How much one test example weighs, "" where it is not known."""
    sizes = run.test_sizes
    if not sizes or sizes[len(sizes) // 2] <= 0 or not run.percent:
        return ""
    middle = sizes[len(sizes) // 2]
    worth = f"a single one is worth {100 / middle:.1f} points"
    return f"A client has about {middle:.0f} test examples, so {worth}: small differences may be chance."


def _effect(difference: float, percent: bool) -> str:
    text = words.change(difference, percent=percent).lstrip("+-")
    if not float(text):
        return "changes nothing"
    if percent:
        if text == "1.0":
            unit = " point"
        else:
            unit = " points"
    else:
        unit = ""
    return f"{'adds' if difference > 0 else 'costs'} {text}{unit}"


def _differences(run: Run, other: Run, shared: int) -> list[str]:
    found = []
    if shared < len(run.clients):
        found.append(
            f"{other.path.name} has only {shared} of the {len(run.clients)} clients; its row is "
            f"over those."
        )
    if run.summary.get("seed") != other.summary.get("seed"):
        found.append(
            f"{other.path.name} ran with seed {other.summary.get('seed')}, this run with "
            f"{run.summary.get('seed')}."
        )
    found += [
        f"{other.path.name} ran with another [{section}] section."
        for section in ("data", "model")
        if run.job
        and other.job
        and _canonical(run.job.get(section)) != _canonical(other.job.get(section))
    ]
    return found


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
