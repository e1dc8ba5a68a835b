"""Between sites: each has its own folder, its own data and its own word; the server sees none of
them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.engines.grid import FakeGrid, virtual
from tests.engines.test_failures import events, trained
from tests.stops import StopAfter
from tests.test_run import adapters, lines
from tests.tiny import save_silos, tiny_job

from fedgrove.engines.flower.serve import between_sites
from fedgrove.ground.errors import JobError, RunError
from fedgrove.start import run
from fedgrove.tracking.callback import Callback
from fedgrove.use.result import Result

__all__ = ["virtual"]
pytestmark = pytest.mark.usefixtures("virtual")

SITE = """[site]
name = "site-{index}"
server = "127.0.0.1:9092"
[data]
path = "{data}"
[budget]
rank = {rank}
[allow]
models = {{ "{model}" = "{model}" }}
methods = ["*"]
max_rounds = 100
"""


@pytest.fixture
def folders(tiny_bert: Path, tmp_path: Path) -> list[Path]:
    """Three sites with the data of the silos."""
    made = []
    for index, file in enumerate(sorted(save_silos(tmp_path / "silos").iterdir())):
        folder = tmp_path / "sites" / file.stem
        folder.mkdir(parents=True)
        text = SITE.format(index=index, data=file, rank=4, model=tiny_bert)
        (folder / "site.toml").write_text(text, encoding="utf-8")
        made.append(folder)
    return made


@pytest.fixture
def grid(folders: list[Path]) -> FakeGrid:
    return FakeGrid(
        3, configs={index + 1: {"site": str(folder)} for index, folder in enumerate(folders)}
    )


def job_for(bert: Path, tmp_path: Path, **changes: Any) -> Any:
    changes.setdefault("federation", {}).setdefault("min_clients", 3)
    changes.setdefault("data", {})["labels"] = ["negative", "positive"]
    changes.setdefault("train", {})["cohort"] = 1
    return tiny_job(bert, tmp_path / "silos", **changes)


def serve(
    grid: FakeGrid, job: Any, out: Path, names: dict[int, str] | None = None, **more: Any
) -> Result:
    return run(job, out, engine=partial(between_sites, grid, names), **more)


@pytest.mark.parametrize("method", ["fedsa-lora", "hilora"])
def test_sites_end_with_the_adapters_of_a_local_run(
    method: str, grid: FakeGrid, folders: list[Path], tiny_bert: Path, tmp_path: Path
) -> None:
    job = job_for(tiny_bert, tmp_path, method={"name": method}, run={"rounds": 4})
    run(job, tmp_path / "local")
    with pytest.raises(KeyboardInterrupt):
        serve(grid, job, tmp_path / "out", callbacks=[StopAfter(3, 2)])
    serve(grid, job, tmp_path / "out", resume=True)
    assert lines(tmp_path / "out") == lines(tmp_path / "local")
    (key,) = {path.name for folder in folders for path in (folder / "runs").iterdir()}
    for folder in folders:
        name = folder.name
        at_home = {
            file.name: file.read_bytes()
            for file in (folder / "runs" / key / "adapters" / name).iterdir()
        }
        there = {
            Path(path).name: content
            for path, content in adapters(tmp_path / "local").items()
            if name in path
        }
        assert {n: at_home[n] for n in at_home if n.endswith("safetensors")} == {
            n: there[n] for n in there if n.endswith("safetensors")
        }
        assert not (tmp_path / "out" / "adapters" / name).exists(), (
            "a site's adapter is nobody else's"
        )


def test_texts_and_label_counts_stay_at_the_sites(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    found = serve(grid, job_for(tiny_bert, tmp_path), tmp_path / "out")
    up = b"".join(blob for way, blob in grid.blobs if way == "up")
    rows = [row for file in (tmp_path / "silos").iterdir() for row in file.read_text().splitlines()]
    assert len(rows) > 60
    assert not any(row.split('"')[3].encode() in up for row in rows)
    assert all(not row["labels"] for row in decode_rows(found.path))


def decode_rows(out: Path) -> list[dict[str, Any]]:
    import json

    clients: list[dict[str, Any]] = json.loads((out / "federation.json").read_text())["clients"]
    return clients


class Appear(Callback):
    """A node that comes (or goes) when a round begins."""

    def __init__(self, grid: FakeGrid, round: int, node: int):
        self.grid, self.round, self.node = grid, round, node

    def round_done(self, round: int, summary: Any) -> None:
        if round == self.round - 1:
            self.grid.online.add(self.node)


def test_a_site_that_comes_late_trains_from_then_on(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    grid.online.discard(2)
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2}, run={"rounds": 4})
    with pytest.raises(KeyboardInterrupt):
        serve(grid, job, tmp_path / "out", callbacks=[Appear(grid, 2, 2), StopAfter(4, 1)])
    found = serve(grid, job, tmp_path / "out", resume=True)
    assert trained(tmp_path / "out", 1) == {"site-0", "site-2"}
    assert (
        trained(tmp_path / "out", 2)
        == trained(tmp_path / "out", 4)
        == {"site-0", "site-1", "site-2"}
    )
    assert [(e["round"], e["client"], e["event"]) for e in events(tmp_path / "out")] == [
        (2, "site-1", "joined")
    ]
    assert set(found.summary["clients"]) == {"site-0", "site-1", "site-2"}
    assert {row["name"] for row in decode_rows(tmp_path / "out")} == {"site-0", "site-1", "site-2"}


def test_a_site_that_a_method_cannot_place_is_refused_and_the_run_goes_on(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    grid.online.discard(2)
    changes: dict[str, Any] = {"federation": {"min_clients": 2}, "run": {"rounds": 4}}
    job = job_for(tiny_bert, tmp_path, **changes, method={"name": "fedlease"})
    serve(grid, job, tmp_path / "out", callbacks=[Appear(grid, 4, 2)])
    joined, refused = events(tmp_path / "out")
    assert (joined["client"], joined["event"]) == ("site-1", "joined")
    assert (refused["client"], refused["event"]) == ("site-1", "refused")
    assert "FedLEASE cannot take it in" in refused["reason"]
    assert trained(tmp_path / "out", 4) == {"site-0", "site-2"}


def test_a_site_keeps_the_last_word(
    grid: FakeGrid, folders: list[Path], tiny_bert: Path, tmp_path: Path
) -> None:
    file = folders[1] / "site.toml"
    file.write_text(file.read_text().replace('methods = ["*"]', 'methods = ["hilora"]'))
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2})
    found = serve(grid, job, tmp_path / "out")
    assert set(found.summary["clients"]) == {"site-0", "site-2"}
    (event,) = events(tmp_path / "out")
    assert event["event"] == "refused"
    assert "the method 'fedit' is not allowed" in event["reason"]


def test_a_node_with_the_key_of_another_site_is_refused(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2})
    found = serve(grid, job, tmp_path / "out", names={1: "site-0", 2: "site-2", 3: "site-2"})
    assert set(found.summary["clients"]) == {"site-0", "site-2"}
    (event,) = events(tmp_path / "out")
    assert (event["client"], event["reason"]) == ("site-1", "its node has the key of 'site-2'")


def test_a_site_with_a_small_budget_trains_a_smaller_rank(
    grid: FakeGrid, folders: list[Path], tiny_bert: Path, tmp_path: Path
) -> None:
    file = folders[1] / "site.toml"
    file.write_text(file.read_text().replace("rank = 4", "rank = 2"))
    found = serve(
        grid, job_for(tiny_bert, tmp_path, method={"name": "fed-plora"}), tmp_path / "mixed"
    )
    assert [row["rank"] for row in found.summary["clients"].values()] == [4, 2, 4]
    with pytest.raises(JobError, match="uniform_rank"):
        serve(grid, job_for(tiny_bert, tmp_path), tmp_path / "equal")


def test_what_a_deployment_cannot_look_up_must_be_in_the_job(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=r"data\.labels is missing"):
        serve(grid, tiny_job(tiny_bert, tmp_path / "silos"), tmp_path / "out")
    with pytest.raises(JobError, match=r"federation\.held_out = 0\.4"):
        serve(grid, job_for(tiny_bert, tmp_path, federation={"held_out": 0.4}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_named_site_is_held_out(grid: FakeGrid, tiny_bert: Path, tmp_path: Path) -> None:
    job = job_for(
        tiny_bert,
        tmp_path,
        federation={"held_out": ["site-2"], "newcomer_head": False, "min_clients": 2},
    )
    found = serve(grid, job, tmp_path / "out")
    assert {line["client"] for line in found.metrics()} == {"site-0", "site-1"}
    assert found.summary["clients"]["site-2"]["held_out"] is True


def test_a_site_that_lost_its_store_says_so(
    grid: FakeGrid, folders: list[Path], tiny_bert: Path, tmp_path: Path
) -> None:
    job = job_for(tiny_bert, tmp_path, method={"name": "fedsa-lora"})
    with pytest.raises(KeyboardInterrupt):
        serve(grid, job, tmp_path / "out", callbacks=[StopAfter(3)])
    for file in (folders[0] / "runs").rglob("store-*"):
        file.unlink()
    with pytest.raises(RunError, match=r"site-0: .*no readable store of round 2"):
        serve(grid, job, tmp_path / "out", resume=True)
