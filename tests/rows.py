"""Rows of each task on texts that the tiny model can read, and a job of each."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.tiny import BAD, FILLER, GOOD, tiny_job

TASKS: dict[str, dict[str, Any]] = {
    "labels": {},
    "regression": {"targets": ["points", "length"]},
    "tokens": {},
    "spans": {"context": "text", "stride": 4},
}


def task_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts with good and bad words: "label" (a list of up, down), "points" and "length", "spans"
    of the words, "up" or "down".
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices([*GOOD, *BAD], k=draw.randint(0, 3)) + draw.choices(FILLER, k=3)
        draw.shuffle(words)
        rows.append(row_of(words))
    return rows


def row_of(words: list[str]) -> dict[str, Any]:
    kinds = [kind_of(word) for word in words]
    spans, start = [], 0
    for word, kind in zip(words, kinds, strict=True):
        if kind:
            spans.append({"start": start, "end": start + len(word), "label": kind})
        start += len(word) + 1
    return {
        "text": " ".join(words),
        "label": sorted({kind for kind in kinds if kind}),
        "points": 100.0 + 5.0 * (kinds.count("up") - kinds.count("down")),
        "length": len(words) / 10,
        "spans": spans,
        "question": "what was it",
        "answers": _answers(words, kinds),
    }


def _answers(words: list[str], kinds: list[str]) -> list[dict[str, Any]]:
    """The first good or bad word, else the first one."""
    number = next((place for place, kind in enumerate(kinds) if kind), 0)
    start = sum(len(word) + 1 for word in words[:number])
    return [{"text": words[number], "start": start}]


def kind_of(word: str) -> str:
    if word in GOOD:
        return "up"
    if word in BAD:
        return "down"
    return ""


def save_rows(folder: Path, clients: int = 3, rows: int = 24) -> Path:
    """One jsonl file for each client."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(clients):
        lines = [json.dumps(row) for row in task_rows(rows + 4 * index, seed=index)]
        (folder / f"site-{index}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def task_job(bert: Path, folder: Path, task: str, /, **changes: dict[str, Any]) -> Any:
    """A tiny job of a task on such a folder."""
    data = {"task": task, **TASKS[task], **changes.pop("data", {})}
    train = {"lr": 2e-2, "local_steps": 6, **changes.pop("train", {})}
    run = {"rounds": 2, **changes.pop("run", {})}
    return tiny_job(bert, folder, data=data, train=train, run=run, **changes)
