"""Jobs and files that the tests of this room share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgrove.job import Job

MakeJob = Callable[..., Job]


@pytest.fixture
def make_job() -> MakeJob:
    """``make_job("data.text='words'", ...)``: the plain job (no groups, all rows) with these
    settings.
    """

    def make(*settings: str) -> Job:
        return Job.parse("").override(list(settings))

    return make


@pytest.fixture
def write_rows() -> Callable[[Path, list[dict[str, Any]]], Path]:
    """Writes rows as JSON lines."""

    def write(path: Path, rows: list[dict[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """``rows(20, "ab")``: 20 different texts whose labels take turns."""

    def make(count: int, labels: str = "ab", word: str = "text") -> list[dict[str, Any]]:
        return [
            {"text": f"{word} number {i}", "label": labels[i % len(labels)]} for i in range(count)
        ]

    return make
