"""Runs of these tests write no pictures: the report has its own tests, and drawing is what takes the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def blank(run_dir: Path, *_: Any, **__: Any) -> Path:
        (run_dir / "report.html").write_text("left out in this test\n", encoding="utf-8")
        return run_dir / "report.html"

    monkeypatch.setattr("fedgrove.finish.write_report", blank)
