"""What each tier of HiLoRA adds, from the files of a run directory, as plain data. Nothing here
imports matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgrove.ground import words
from fedgrove.ground.plain import Given
from fedgrove.ground.statistics import mean, std, tail10
from fedgrove.tracking import metrics


@dataclass(frozen=True)
class Tiers:
    """``names``: "root", "+ cluster", ... in order; ``clients``: each one's metric after each of
    them.
    """

    names: list[str]
    rounds: list[str]
    clients: dict[str, list[float]]
    labels: dict[str, int]  # client -> cluster
    metric: str
    unseen: dict[str, float]  # mean of the clients that never trained, by when
    newcomers: int
    missing: list[str]  # tiers at whose end nobody was evaluated

    @classmethod
    def read(cls, run_dir: Path, content: Given) -> Tiers:
        """From metrics.jsonl and, for those that never trained, summary.json where it is there."""
        everything = metrics.read(run_dir / "metrics.jsonl")
        lines = [line for line in everything if line["split"] == "test"]
        names = filter(None, map(metrics.metric_name, lines))
        metric = next(names, "score")
        scores: dict[int, dict[str, float]] = {}
        for line in lines:
            value = line.get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                row = scores.setdefault(line["round"], {})
                row[line["client"]] = float(value)
        ends: dict[str, tuple[int, dict[str, float]]] = {}
        missing: list[str] = []
        for part in content.get("tiers", []):
            seen = [round for round in scores if part["first"] <= round <= part["last"]]
            if seen:
                last = max(seen)
                ends[part["tier"]] = (last, scores[last])
            else:
                missing.append(part["tier"])
        rows = [found for _, found in ends.values()]
        common: set[str] = set()
        if rows:
            common = set.intersection(*map(set, rows))
        labels = dict(zip(content["clients"], content["labels"], strict=True))
        unseen, newcomers = _unseen(run_dir)
        return cls(
            names=_added(list(ends)),
            rounds=[str(round) for round, _ in ends.values()],
            clients={name: [found[name] for found in rows] for name in sorted(common)},
            labels=labels | content.get("late", {}),
            metric=metric,
            unseen=unseen,
            newcomers=newcomers,
            missing=missing,
        )

    @property
    def columns(self) -> list[list[float]]:
        """All clients' values after each tier."""
        return [list(column) for column in zip(*self.clients.values(), strict=True)]

    @property
    def means(self) -> list[float]:
        return [mean(column) for column in self.columns]

    @property
    def spreads(self) -> list[float]:
        return [std(column) for column in self.columns]

    @property
    def percent(self) -> bool:
        return words.shares(value for column in self.columns for value in column)

    def table(self) -> list[list[str]]:
        rows = [["after", "round", "mean", "std", "tail"]]
        for name, round, column in zip(
            self.names,
            self.rounds,
            self.columns,
            strict=True,
        ):
            cells = [name, round]
            for number in (mean(column), std(column), tail10(column)):
                score = words.score(number, percent=self.percent)
                cells.append(words.typographic(score))
            rows.append(cells)
        return rows


def _added(tiers: Sequence[str]) -> list[str]:
    """``root``, ``+ cluster``, …"""
    return [*tiers[:1], *(f"+ {tier}" for tier in tiers[1:])]


def _unseen(run_dir: Path) -> tuple[dict[str, float], int]:
    """The mean of the clients that never trained, by when; and how many they are."""
    try:
        text = (run_dir / "summary.json").read_text(encoding="utf-8")
        rows = json.loads(text)["clients"].values()
    except (OSError, ValueError, KeyError):
        return {}, 0
    new = [row for row in rows if row.get("held_out")]
    found = {}
    for key, when in (
        ("metric", "with root and cluster alone"),
        ("metric_tuned", "after training a leaf"),
    ):
        value = mean(row.get(key) for row in new)
        if not math.isnan(value):
            found[when] = value
    return found, len(new)
