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
        return min(
            self.values,
            key=lambda name: (self.values[name], name),
            default="",
        )


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
        for row in [*others, self.base]:
            if row and row.values:
                return row
        return None

    def gains(self) -> dict[str, float]:
        """``{client: this run − reference}``, largest first; {} without a reference."""
        if not self.reference:
            return {}
        other = self.reference.values
        gain = {}
        for name, value in self.ours.values.items():
            if name in other:
                gain[name] = value - other[name]
        in_order = sorted(gain, key=lambda name: (-gain[name], name))
        return {name: gain[name] for name in in_order}


def compare(run: Run, baselines: Sequence[Run]) -> Comparison:
    """Rows over the clients of ``run``; a baseline without any of them gets a warning in place of a
    row.
    """
    base = Row("Untouched base, head only", run.values("metric_base"), "base")
    ours = Row(
        _label(run),
        run.values("metric"),
        "ours",
        "this run",
    )
    rows = []
    warnings = []
    local = None
    if base.values:
        rows.append(base)
    for other in baselines:
        scores = other.values("metric")
        values = {name: value for name, value in scores.items() if name in run.clients}
        if not values:
            warnings.append(
                f"{other.path.name} has no client in common with this run, so it is not in the "
                f"table."
            )
            continue
        warnings += _differences(run, other, len(values))
        kind = "other"
        if other.alone:
            kind = "local"
        row = Row(_label(other), values, kind, other.path.name)
        rows.append(row)
        if other.alone and local is None and not run.alone:
            local = row
    rows.append(ours)
    tuned = run.values("metric_tuned")
    if tuned:
        rows.append(Row("… then trained on at each client", tuned, "tuned"))
    return Comparison(
        tuple(rows),
        ours,
        base,
        local,
        tuple(warnings),
    )


def _label(run: Run) -> str:
    if run.alone:
        return "Each client alone"
    return f"Together: {run.method}"


def unseen(run: Run) -> list[Row]:
    """The clients that never trained: as they arrive, and after local training where the run did
    it.
    """
    newcomers = words.count(len(run.newcomers), "client")
    label = f"{newcomers} that never trained"
    found = []
    for key, title in (("metric", label), ("metric_tuned", "… then trained on at each of them")):
        values = {}
        for name, row in run.newcomers.items():
            value = row.get(key)
            if isinstance(value, int | float):
                values[name] = value
        if values:
            found.append(Row(title, values, "unseen"))
    return found


def verdict(run: Run, comparison: Comparison) -> list[str]:
    """What came out, in sentences that are true whatever the numbers are."""
    ours = comparison.ours
    base = comparison.base
    local = comparison.local
    percent = run.percent
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
        average = _effect(ours.mean - local.mean, percent)
        weakest = _effect(ours.tail - local.tail, percent)
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
    if comparison.reference and len(gains) > 1:
        said.append(_better_off(list(gains.values()), comparison.reference))
    if run.newcomers:
        more = words.count(len(run.newcomers), "more client")
        said.append(f"{more} never trained and only tried the result.")
    return said


def _better_off(gains: Sequence[float], reference: Row) -> str:
    """How many clients win and lose."""
    better = sum(gain > 0 for gain in gains)
    worse = sum(gain < 0 for gain in gains)
    same = len(gains) - better - worse
    known = {"local": "than alone", "base": "than with the base"}
    than = known.get(reference.kind, f"than in {reference.note}")
    unchanged = ""
    if same:
        unchanged = f", {same} unchanged"
    are = "are"
    if better == 1:
        are = "is"
    return (
        f"{better:,} of {len(gains):,} clients {are} better off {than}, {worse:,} worse{unchanged}."
    )


def grain(run: Run) -> str:
    """How much one test example weighs, "" where it is not known."""
    sizes = run.test_sizes
    if not sizes or not run.percent:
        return ""
    middle = sizes[len(sizes) // 2]
    if middle <= 0:
        return ""
    worth = f"a single one is worth {100 / middle:.1f} points"
    return f"A client has about {middle:.0f} test examples, so {worth}: small differences may be chance."


def _effect(difference: float, percent: bool) -> str:
    text = words.change(difference, percent=percent).lstrip("+-")
    if not float(text):
        return "changes nothing"
    does = "costs"
    if difference > 0:
        does = "adds"
    if not percent:
        return f"{does} {text}"
    if text == "1.0":
        return f"{does} {text} point"
    return f"{does} {text} points"


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
