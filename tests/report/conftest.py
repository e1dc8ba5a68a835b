"""Run directories made up for tests: the files of a real run, with numbers from a seeded
generator.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedgrove.ground import files
from fedgrove.tracking import summary as summaries

GROUPS = ("amazon", "movies", "nyt", "tweets")
LABELS = ("negative", "neutral", "positive")

JOB = """\
[model]
name = "minilm"
head = "pooled"

[lora]
rank = 8
alpha = 16.0
targets = "auto"

[data]
source = "embedded"
name = "sentiment"

[federation]
clients = {clients}
fraction = 1.0
head = "local"

[method]
name = "{method}"

[train]
local_steps = 8
lr = 0.001

[run]
rounds = {rounds}
seed = {seed}
"""


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run("fedit", clients=3, ...)`` writes ``tmp_path/fedit``, see ``build``."""

    def make(folder: str, **options: Any) -> Path:
        return build(tmp_path / folder, **options)

    return make


def change(path: Path, summary: dict[str, Any]) -> Path:
    """Give the run in ``path`` another summary.json."""
    files.write_json(path / "summary.json", summary)
    return path


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of the federation's own picture: a one-pixel PNG. The tables that it was asked for
    are collected.
    """
    asked: list[dict[str, Any]] = []
    stub = ModuleType("fedgrove.federation.picture")

    def who_holds_what(table: dict[str, Any], target: Path) -> None:
        asked.append(table)
        target.write_bytes(b"\x89PNG")

    stub.who_holds_what = who_holds_what  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return asked


def build(
    path: Path,
    *,
    method: str = "fedit",
    clients: int = 16,
    rounds: int = 8,
    seed: int = 0,
    gain: float = 0.16,
    spread: float = 0.05,
    tuned: bool = False,
    held_out: int = 0,
    nan_losses: bool = False,
    names: list[str] | None = None,
) -> Path:
    """Write job.toml, metrics.jsonl, summary.json, federation.json and versions.json into ``path``
    and return it.

    The same ``seed`` gives the same clients, data and base whatever the method, so that runs are
    comparable. ``gain`` is what the average client wins over the base by the end, ``spread`` how
    far clients differ in that.
    """
    path.mkdir(parents=True, exist_ok=True)
    rng, own = np.random.default_rng(seed), np.random.default_rng([seed, *method.encode()])
    everyone = names or _names(clients + held_out)
    new = set(everyone[len(everyone) - held_out :]) if held_out else set()
    counts = {name: rng.multinomial(60, rng.dirichlet([0.6] * 3)) for name in everyone}
    tests = {name: int(rng.integers(24, 60)) for name in everyone}
    base = {name: float(np.clip(rng.normal(0.56, 0.10), 0.2, 0.8)) for name in everyone}
    end = {
        name: float(np.clip(base[name] + own.normal(gain, spread), 0.1, 0.98)) for name in everyone
    }
    training = [name for name in everyone if name not in new]

    lines: list[dict[str, Any]] = []
    for round in range(1, rounds + 1):
        share = 1 - float(np.exp(-3.0 * round / rounds)) if rounds > 1 else 1.0
        for name in training:
            loss = (
                None
                if nan_losses and round > rounds // 2 and name == training[0]
                else 1.05 - 0.6 * share + float(own.normal(0, 0.06))
            )
            lines.append(
                {
                    "round": round,
                    "client": name,
                    "split": "train",
                    "loss": loss,
                    "examples": 60,
                    "steps": 8,
                    "bytes_up": 98304,
                }
                | {"bytes_down": 98304, "seconds": 0.9}
            )
        for name in training:
            value = base[name] + share * (end[name] - base[name]) + float(own.normal(0, 0.012))
            score = _whole(end[name] if round == rounds else value, tests[name])
            lines.append(
                {
                    "round": round,
                    "client": name,
                    "split": "test",
                    "loss": 1.1 - score / 2,
                    "accuracy": score,
                    "examples": tests[name],
                }
            )
    rows = {
        name: {
            "examples": 60,
            "rank": 8,
            "metric_base": _whole(base[name], tests[name]),
            "metric": _whole(end[name], tests[name]),
            "metric_tuned": _whole(min(end[name] + 0.02, 1.0), tests[name]) if tuned else None,
            "loss": 1.1 - end[name] / 2,
            "held_out": name in new,
        }
        for name in everyone
    }
    summary = summaries.summarise(
        method=method,
        task="classify-text",
        seed=seed,
        rounds=rounds,
        clients=rows,
        parameters={
            "trained": [74883],
            "stored": [74883],
            "sent_up": [73728],
            "sent_down": [73728],
        },
        bytes_up=98304 * rounds * len(training),
        bytes_down=98304 * rounds * len(training),
        seconds={"total": 203.4, "training": 131.0, "evaluation": 38.2, "server": 1.7},
    )
    summary["metric"] = "accuracy"
    table = {
        "labels": list(LABELS),
        "clients": [
            {
                "name": name,
                "group": _group(name),
                "held_out": name in new,
                "train": 60,
                "test": tests[name],
                "validation": 0,
                "labels": dict(zip(LABELS, map(int, counts[name]), strict=True)),
                "median_words": 17,
            }
            for name in everyone
        ],
        "source": {
            "source": "embedded",
            "name": "sentiment",
            "licence": "MIT",
            "note": "four domains",
            "sha256": "0" * 64,
        },
    }
    (path / "job.toml").write_text(
        JOB.format(clients=len(everyone), method=method, rounds=rounds, seed=seed), encoding="utf-8"
    )
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    files.write_json(path / "summary.json", summary)
    files.write_json(path / "federation.json", table)
    files.write_json(
        path / "versions.json",
        {"python": "3.11.9", "fedgrove": "0.1.0", "torch": "2.13.0", "peft": "0.21.0"},
    )
    for name in everyone:
        folder = path / "adapters" / name.replace("/", "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "some/MiniLM-L6"}), encoding="utf-8"
        )
    return path


def _names(count: int) -> list[str]:
    if count <= 16:
        return sorted(f"{group}-{number}" for group in GROUPS for number in range(4))[:count]
    return [f"client-{number:03d}" for number in range(count)]


def _group(name: str) -> str | None:
    first = name.split("-")[0]
    return first if first in GROUPS else None


def _whole(share: float, examples: int) -> float:
    """The nearest accuracy that so many examples can have."""
    return round(share * examples) / examples
