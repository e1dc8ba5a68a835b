"""The content of a comparison made up for its page: numbers from a seeded generator."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgrove.compare import collect

Values = dict[str, dict[str, float]]


def content(clients: int = 12, methods: int = 4, seeds: int = 2, rounds: int = 5) -> dict[str, Any]:
    """``compare.json`` of that many clients and methods, training alone first."""
    rng = np.random.default_rng(clients)
    labels = ["local", "fedit", "hilora", "a rather long label: fedtreelora[K=2]", "ffa-lora"]
    base = _values(rng, clients, seeds, 0.5)
    rows = [
        _row(rng, labels[place % 5], 0.6 + 0.03 * place, clients, seeds, rounds)
        for place in range(methods)
    ]
    made: dict[str, Any] = {
        "format": 1,
        "fedgrove": "0.0",
        "metric": "accuracy",
        "percent": True,
        "writes": False,
        "head": "local",
        "model": "minilm",
        "data": "sentiment",
        "rounds": rounds,
        "final_local_epochs": 2,
        "clients": clients,
        "held_out": 0,
        "seeds": list(range(seeds)),
        "tuning": None,
        "base": {"label": "base, head alone", "metric": collect._statistics(base)},
        "methods": rows,
        "notes": ["Training alone (local) was added."],
    }
    made["tests"] = {measure: collect.tests(rows, measure) for measure in collect.MEASURES}
    return made


def _row(
    rng: np.random.Generator, label: str, level: float, clients: int, seeds: int, rounds: int
) -> dict[str, Any]:
    alone = label == "local"
    values = {
        "metric": _values(rng, clients, seeds, level),
        "metric_tuned": _values(rng, clients, seeds, level + 0.04),
    }
    curve = [
        {
            "round": round,
            "bytes": 0 if alone else 1_000_000 * round,
            "mean": level - 0.2 / round,
            "low": level - 0.2 / round - 0.01,
            "high": level - 0.2 / round + 0.01,
        }
        for round in range(1, rounds + 1)
    ]
    return {
        "label": label,
        "method": label,
        "options": [],
        "runs": f"runs/{label}",
        "chosen": {},
        **{measure: collect._statistics(each) for measure, each in values.items()},
        "loss": {"mean": 0.9, "std": 0.01},
        "unseen": None,
        "parameters": {"trained": 74_883, "stored": 74_883, "sent_up": 73_728, "sent_down": 73_728},
        "bytes": {"up": 0 if alone else 5_000_000, "down": 0 if alone else 5_000_000},
        "seconds": 123.0,
        "curve": curve,
        "values": values,
    }


def _values(rng: np.random.Generator, clients: int, seeds: int, level: float) -> Values:
    def drawn() -> dict[str, float]:
        scores = np.clip(rng.normal(level, 0.08, clients), 0.05, 0.99)
        return {f"client-{place:04d}": float(score) for place, score in enumerate(scores)}

    return {str(seed): drawn() for seed in range(seeds)}
