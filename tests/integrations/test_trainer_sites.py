"""Two sites of a deployment whose clients are Trainers, over real messages in this process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.deploy.test_sites import SITE, job_for, serve
from tests.engines.grid import FakeGrid, virtual
from tests.test_run import adapters, lines
from tests.tiny import save_silos, without_reports

from fedgrove.deploy import app
from fedgrove.ground.errors import FedgroveError
from fedgrove.integrations.trainer import attend, half_of, simulated
from fedgrove.start import run

pytest.importorskip("accelerate")
from tests.integrations.test_trainer import trainer_of

__all__ = ["virtual"]


@pytest.mark.usefixtures("virtual")
def test_two_sites_with_trainers_end_with_the_adapters_of_a_simulation(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for index, file in enumerate(sorted(save_silos(tmp_path / "silos", clients=2).iterdir())):
        folder = tmp_path / "sites" / file.stem
        folder.mkdir(parents=True)
        text = SITE.format(index=index, data=file, rank=4, model=tiny_bert)
        (folder / "site.toml").write_text(text, encoding="utf-8")
        folders.append(folder)
    changes: dict[str, Any] = {
        "method": {"name": "fedsa-lora"},
        "model": {"head": "stock"},
        "run": {"rounds": 2},
        "federation": {"min_clients": 2},
    }
    job = job_for(tiny_bert, tmp_path, **changes)
    make = partial(trainer_of, tmp_path / "out")
    monkeypatch.setattr(app, "client", app.site_client(partial(half_of, make=make)))
    configs = {index + 1: {"site": str(folder)} for index, folder in enumerate(folders)}
    with without_reports():
        run(job, tmp_path / "local", engine=simulated(make))
        serve(FakeGrid(2, configs=configs), job, tmp_path / "served")
    assert lines(tmp_path / "served") == lines(tmp_path / "local")
    for folder in folders:
        (home,) = (folder / "runs").glob(f"*/adapters/{folder.name}")
        there = adapters(tmp_path / "local")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (home / name).read_bytes() == there[f"adapters/{folder.name}/{name}"]


def test_a_site_that_is_none_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(FedgroveError, match="site"):
        attend(tmp_path / "nowhere", partial(trainer_of, tmp_path))
