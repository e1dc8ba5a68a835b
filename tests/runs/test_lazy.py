"""A run whose clients' rows do not fit the cache gives the bytes of one whose do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.test_run import adapters, lines, summary
from tests.tiny import save_silos, tiny_job, without_reports

from fedgrove.engines.local import prepare
from fedgrove.federation import encoded
from fedgrove.start import run
from fedgrove.training.kernel import Kernel


def test_bytes_and_measures_are_the_same(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_silos(tmp_path / "silos", clients=5, rows=12)
    job = tiny_job(tiny_bert, folder, run={"rounds": 2})
    evaluate = Kernel.evaluate
    count = 0

    def counted(*args: object, **kwargs: object) -> dict[str, float]:
        nonlocal count
        count += 1
        return evaluate(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Kernel, "evaluate", counted)
    with without_reports():
        run(job, tmp_path / "kept")
        before, count = count, 0
        monkeypatch.setattr(encoded.EncodedClients.__init__, "__defaults__", (1,))
        assert len(prepare(job).engine.data.ready) == 1
        run(job, tmp_path / "lazy")
    assert count == before, "nothing is measured twice"
    for read in (adapters, lines, summary):
        assert read(tmp_path / "lazy") == read(tmp_path / "kept")
