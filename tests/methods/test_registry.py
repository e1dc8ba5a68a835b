"""Methods from outside the package run by their name; tests/test_plugins.py has the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny import tiny_job

from fedgrove.methods import registry
from fedgrove.methods.fedit import FedIT
from fedgrove.start import run


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    registry.METHODS.forget()


def test_a_registered_method_runs_by_its_name(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    @registry.register
    class Mine(FedIT):
        name = "mine"
        title = "Mine"

    job = tiny_job(tiny_bert, silos).override(
        ["method.name=mine", "method.weights=uniform", "run.rounds=1"]
    )
    result = run(job, tmp_path / "out")
    assert result.summary["method"] == "mine"
    assert registry.method_class("mine") is Mine


def test_what_stands_for_other_names_is_a_method() -> None:
    from fedgrove.job.sections import NOT_METHODS
    from fedgrove.methods.registry import names

    for words in NOT_METHODS.values():
        quoted = re.findall(r'"(.+?)"', words)
        assert quoted
        assert set(quoted) <= set(names())
