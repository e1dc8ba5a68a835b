"""What each tier of HiLoRA adds, from the files of a run directory, as plain data. Nothing here
imports matplotlib.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgrove.ground import words
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
    def read(cls, run_dir: Path, content: Mapping[str, Any]) -> Tiers:
        """From metrics.jsonl and, for those that never trained, summary.json where it is there."""
        lines = [
            line for line in metrics.read(run_dir / "metrics.jsonl") if line["split"] == "test"
        ]
        metric = next((name for name in map(metrics.metric_name, lines) if name), "score")
        scores: dict[int, dict[str, float]] = {}
        for line in lines:
            value = line.get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                scores.setdefault(line["round"], {})[line["client"]] = float(value)
        ends: dict[str, tuple[int, dict[str, float]]] = {}
        missing: list[str] = []
        for part in content.get("tiers", []):
            seen = [round for round in scores if part["first"] <= round <= part["last"]]
            if seen:
                ends[part["tier"]] = (max(seen), scores[max(seen)])
            else:
                missing.append(part["tier"])
        if ends:
            common = set.intersection(*(set(found) for _, found in ends.values()))
        else:
            common = set()
        return cls(
            names=[("+ " if number else "") + tier for number, tier in enumerate(ends)],
            rounds=[str(round) for round, _ in ends.values()],
            clients={name: [found[name] for _, found in ends.values()] for name in sorted(common)},
            labels=dict(zip(content["clients"], content["labels"], strict=True))
            | content.get("late", {}),
            metric=metric,
            missing=missing,
            **_unseen(run_dir),
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
        for name, round, column in zip(self.names, self.rounds, self.columns, strict=True):
            numbers = (mean(column), std(column), tail10(column))
            rows.append(
                [
                    name,
                    round,
                    *(
                        words.typographic(words.score(value, percent=self.percent))
                        for value in numbers
                    ),
                ]
            )
        return rows


def _unseen(run_dir: Path) -> dict[str, Any]:
    try:
        rows = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))[
            "clients"
        ].values()
    except (OSError, ValueError, KeyError):
        return {"unseen": {}, "newcomers": 0}
    new = [row for row in rows if row.get("held_out")]
    found = {
        "with root and cluster alone": mean(row.get("metric") for row in new),
        "after training a leaf": mean(row.get("metric_tuned") for row in new),
    }
    return {
        "unseen": {when: value for when, value in found.items() if not math.isnan(value)},
        "newcomers": len(new),
    }
