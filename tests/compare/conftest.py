"""A finished comparison on the tiny model. Its runs draw no reports: those have their own tests and
take the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_job, without_reports

from fedgrove.compare import compare
from fedgrove.job import Job


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Iterator[None]:
    with without_reports():
        yield


@pytest.fixture(scope="session")
def job(tiny_bert: Path, silos: Path) -> Job:
    made: Job = tiny_job(tiny_bert, silos, run={"rounds": 2})
    return made


#: One method with an option of its own (training alone comes by itself), two seeds, two trials.
ASKED: dict[str, Any] = {
    "methods": "alike: fedit[weights=uniform]",
    "seeds": "0,1",
    "tune": ["lr=1e-4,2e-2"],
}


@pytest.fixture(scope="session")
def compared(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    with without_reports():  # it outlives a module
        compare(job, out=out, settings=["federation.held_out=['site-2']"], **ASKED)
    return out
