"""``--engine flower`` on Ray, and the app that ``flwr run`` runs."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from tests.engines.grid import FakeGrid, virtual
from tests.engines.test_flower_equal import JOBS, same
from tests.stops import StopAfter
from tests.test_run import lines
from tests.tiny import tiny_job

from fedgrove.deploy import app
from fedgrove.deploy.strategy import Rounds
from fedgrove.engines.flower import client_app
from fedgrove.engines.flower.post import from_content, to_content
from fedgrove.engines.flower.simulate import FlowerMissing, require, resources
from fedgrove.engines.flower.wire import Note, decode, encode
from fedgrove.ground.errors import JobError
from fedgrove.start import run

__all__ = ["virtual"]
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own: of resources that its start leaves open
@pytest.mark.parametrize("method", JOBS)
def test_a_simulation_on_ray_equals_a_local_run(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    changes = {key: dict(value) for key, value in JOBS[method].items()}
    changes.setdefault("method", {})["name"] = method
    job = tiny_job(tiny_bert, silos, **changes, train={"cohort": 1})
    run(job, tmp_path / "local")
    run(job, tmp_path / "flower", engine="flower")
    same(tmp_path / "local", tmp_path / "flower")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_simulation_on_ray_stops_and_goes_on(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "federation": {"ranks": [2, 4, 3], "held_out": ["site-1"]},
        "train": {"cohort": 1},
    }
    job = tiny_job(tiny_bert, silos, method={"name": "fed-plora"}, **changes)
    run(job, tmp_path / "local")
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "flower", engine="flower", callbacks=[StopAfter(2)])
    run(job, tmp_path / "flower", engine="flower", resume=True)
    same(tmp_path / "local", tmp_path / "flower")


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else object()
    )
    with pytest.raises(FlowerMissing, match=r"needs the package ray; .*fedgrove\[flower\]"):
        require()


def test_an_engine_that_is_none_is_refused(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no engine 'flowers'; there are local and flower"):
        run(tiny_job(tiny_bert, silos), tmp_path / "out", engine="flowers")
    assert not (tmp_path / "out").exists()


def test_ray_gets_no_more_processes_than_clients(
    tiny_bert: Path, silos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tiny_bert, silos, train={"threads": 4})
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = resources(3, job)
    assert found["init_args"]["num_cpus"] == 12
    assert found["client_resources"] == {"num_cpus": 4, "num_gpus": 0.0}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "num_cpus" not in resources(3, job)["init_args"], "a running cluster has its own"


# ------------------------------------------------------------ the app
def test_the_example_app_names_what_there_is() -> None:
    config = tomllib.loads(
        (ROOT / "examples" / "flower-app" / "pyproject.toml").read_text(encoding="utf-8")
    )
    components = config["tool"]["flwr"]["app"]["components"]
    assert components == {name + "app": f"{app.__name__}:{name}" for name in ("server", "client")}
    assert set(config["tool"]["flwr"]["app"]["config"]) == {"job", "out", "resume", "nodes"}


def test_the_server_app_runs_a_job_over_a_grid(
    tiny_bert: Path, silos: Path, tmp_path: Path, virtual: None
) -> None:
    class InMemoryGrid(FakeGrid):
        """By this name the server knows Flower's simulation."""

    job = tiny_job(tiny_bert, silos, run={"rounds": 2})
    (tmp_path / "job.toml").write_text(job.to_toml(), encoding="utf-8")
    config: Any = {"job": str(tmp_path / "job.toml"), "out": str(tmp_path / "out"), "resume": False}
    app.server(InMemoryGrid(3), Context(1, 0, {}, RecordDict(), config))
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_strategy_gives_each_rounds_means(
    tiny_bert: Path, silos: Path, tmp_path: Path, virtual: None, capsys: pytest.CaptureFixture[str]
) -> None:
    class InMemoryGrid(FakeGrid):
        pass

    job = tiny_job(tiny_bert, silos, run={"rounds": 2})
    result = Rounds(job, tmp_path / "out", callbacks=[]).start(InMemoryGrid(3))
    losses = [
        x["loss"] for x in lines(tmp_path / "out") if x["split"] == "train" and x["round"] == 2
    ]
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx(sum(losses) / 3)
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    assert "fedit, 2 rounds" in capsys.readouterr().out


def test_run_configurations_are_checked(tmp_path: Path, tiny_bert: Path, silos: Path) -> None:
    with pytest.raises(JobError, match="names no job"):
        app.job_of("")
    with pytest.raises(JobError, match="no job file"):
        app.job_of(str(tmp_path / "none.toml"))
    job = tiny_job(tiny_bert, silos)
    assert app.job_of(job.to_toml()) == job
    assert app.names_of("7=clinic-a, 9=clinic-b") == {7: "clinic-a", 9: "clinic-b"}
    assert app.names_of("") == {}
    with pytest.raises(JobError, match="NODE=NAME"):
        app.names_of("clinic-a")


@pytest.mark.usefixtures("virtual")
def test_a_node_that_is_no_site_works_only_in_a_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_app, "is_virtual", lambda: False)
    message = Message(to_content(encode(Note("hello", {"run": "1"}))), 1, "query.hello")
    answer = app.client(message, Context(1, 1, {"partition-id": 0}, RecordDict(), {}))
    note = decode(from_content(answer.content))
    assert note.kind == "error"
    assert "has no site" in note.head["sentence"]
