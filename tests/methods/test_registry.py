"""Methods from outside the package: registered in a process, or by an entry point."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from tests.tiny import tiny_job

from fedgrove.ground.errors import JobError
from fedgrove.methods import registry
from fedgrove.methods.fedit import FedIT
from fedgrove.start import run


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    registry._REGISTERED.clear()
    registry.catalogue.cache_clear()


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

    @registry.register
    class Again(FedIT):
        name = "mine"
        title = "Mine, second cell"

    assert registry.method_class("mine") is Again


def test_a_name_that_is_taken_or_missing_is_refused() -> None:
    class Copy(FedIT):
        name = "hilora"

    class Nameless(FedIT):
        pass

    with pytest.raises(JobError, match="called 'hilora', which is HiLoRA already"):
        registry.register(Copy)
    with pytest.raises(JobError, match="Nameless has no name of its own"):
        registry.register(Nameless)


def test_entry_points_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("other", "fedgrove.methods.fedit:FedIT", registry.GROUP)
    broken = EntryPoint("broken", "no_such_package:Thing", registry.GROUP)
    monkeypatch.setattr(FedIT, "name", "other")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    registry.catalogue.cache_clear()
    assert registry.method_class("other") is FedIT
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    registry.catalogue.cache_clear()
    with pytest.raises(JobError, match=r"the method 'broken' of the package .* cannot be loaded"):
        registry.names()
