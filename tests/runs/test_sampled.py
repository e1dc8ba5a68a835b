"""``run.evaluate``: which clients are measured, and that nothing else depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.stops import StopAfter
from tests.test_run import adapters, lines, summary
from tests.tiny import save_silos, tiny_job, without_reports

import fedgrove as fg
from fedgrove.compare import collect
from fedgrove.ground.errors import JobError
from fedgrove.report import data, facts
from fedgrove.runs.sampled import SAMPLE, drawn
from fedgrove.start import run

MEASURES = ("metric_base", "metric", "metric_tuned", "loss")


def test_the_draw_depends_on_seed_round_and_names_alone() -> None:
    names = [f"c{number:03d}" for number in range(300)]
    assert drawn(names, "all", 0, 1) == names
    assert drawn(names[:9], "sample", 0, 1) == names[:9]
    assert drawn(names, 300, 0, 1) == names
    some = drawn(names, "sample", 0, 1)
    assert len(some) == SAMPLE
    assert some == sorted(some)
    assert set(drawn(names[::-1], "sample", 0, 1)) == set(some)
    others = {tuple(drawn(names, 10, seed, round)) for seed in (0, 1) for round in (1, 2)}
    assert len(others) == 4


def test_every_client_is_as_likely_as_any_other() -> None:
    names = [f"c{number}" for number in range(20)]
    counts = dict.fromkeys(names, 0)
    for round in range(1000):
        for name in drawn(names, 5, 3, round):
            counts[name] += 1
    assert all(abs(count - 250) < 5 * (1000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


@pytest.fixture(scope="module")
def job(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> fg.Job:
    folder = save_silos(tmp_path_factory.mktemp("five"), clients=5, rows=12)
    found: fg.Job = tiny_job(tiny_bert, folder, train={"final_local_epochs": 1})
    return found


def test_only_those_drawn_are_measured_and_all_leave_as_ever(job: fg.Job, tmp_path: Path) -> None:
    some = job.replace(run={"evaluate": 2})
    with without_reports():
        run(job, tmp_path / "all")
    result = run(some, tmp_path / "some")
    everyones = adapters(tmp_path / "all")
    ours = adapters(tmp_path / "some")
    assert {name for name in everyones if not name.endswith("measures.json")} == {
        name for name in ours if not name.endswith("measures.json")
    }
    for name in ours:
        if name.endswith("safetensors"):
            assert ours[name] == everyones[name], name
    whole, told = summary(tmp_path / "all"), summary(tmp_path / "some")
    for number in (1, 2, 3):
        names = {
            line["client"]
            for line in lines(tmp_path / "some")
            if line["split"] == "test" and line["round"] == number
        }
        assert names == set(drawn(list(whole["clients"]), 2, 7, number))
    for name, row in told["clients"].items():
        if name in names:
            assert row == whole["clients"][name]
        else:
            assert [row[key] for key in MEASURES] == [None] * 4
    assert "measured" not in whole
    assert told["measured"] == {"clients": 2, "of": 5}
    read = data.load(tmp_path / "some")
    assert dict(facts.settings(read))["clients measured"].startswith("2 of 5")
    assert (tmp_path / "some" / "report.html").exists()
    assert collect._trained(result) == 5
    (note,) = collect._sampled([result])
    assert note.startswith("Each run measured 2 of its 5 clients")


def test_a_resumed_run_measures_the_same_clients(job: fg.Job, tmp_path: Path) -> None:
    some = job.replace(run={"evaluate": 2})
    with without_reports():
        run(some, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            run(some, tmp_path / "again", callbacks=[StopAfter(2)])
        run(some, tmp_path / "again", resume=True)

    def key(where: Path) -> list[object]:
        return [{**line, "seconds": 0} for line in lines(where)]

    assert key(tmp_path / "again") == key(tmp_path / "whole")


@pytest.mark.parametrize("more", [{"keep": "best"}, {"patience": 2}])
def test_rounds_measured_on_different_clients_are_not_compared(
    job: fg.Job, more: dict[str, object]
) -> None:
    with pytest.raises(JobError, match=r"run\.evaluate = 'sample' measures other clients"):
        job.replace(run={"evaluate": "sample", **more})
