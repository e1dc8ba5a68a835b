"""Runs of these tests write no pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.tiny import without_reports


@pytest.fixture(autouse=True)
def no_report() -> Iterator[None]:
    with without_reports():
        yield
