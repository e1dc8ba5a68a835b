"""Failure is normal: clients that err, send nonsense, die, are late or come back do not stop or
spoil a run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.stops import StopAfter
from tests.test_run import adapters, lines, summary
from tests.tiny import tiny_job

from fedgrove.adapters.tree import map_tensors
from fedgrove.engines.flower.wire import Note, decode
from fedgrove.ground.errors import JobError
from fedgrove.runs.loop import TooFew
from fedgrove.start import run
from fedgrove.training.client import ClientHalf

__all__ = ["virtual"]
pytestmark = pytest.mark.usefixtures("virtual")


def events(path: Path) -> list[dict[str, Any]]:
    file = path / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def trained(path: Path, round: int) -> set[str]:
    return {x["client"] for x in lines(path) if x["split"] == "train" and x["round"] == round}


def in_round(round: int, client: str, change: Any) -> Any:
    """Alters what one client answers to one round's offer."""

    def altered(name: str, asked: Note, answer: Note) -> Note | None:
        if asked.kind == "train" and name == client and asked.head["round"] == round:
            found: Note | None = change(answer)
            return found
        return answer

    return altered


def spoiled(answer: Note) -> Note:
    return replace(answer, body=map_tensors(answer.body, lambda tensor: tensor * float("nan")))


def cut(answer: Note) -> Note:
    return replace(answer, body=map_tensors(answer.body, lambda tensor: tensor[:, :-1]))


def without_a_layer(answer: Note) -> Note:
    adapter = dict(answer.body["update"]["method"]["adapter"])
    adapter.popitem()
    return replace(answer, body={"update": {"method": {"adapter": adapter}}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoiled, "not finite"),
        (cut, "shape"),
        (without_a_layer, "server's half failed"),
        (lambda answer: replace(answer, body={}), "no update"),
        (lambda answer: Note("error", {"sentence": "The disk is full."}), "The disk is full."),
    ],
)
def test_an_update_that_cannot_be_used_is_left_out(
    change: Any,
    words: str,
    tiny_bert: Path,
    silos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fedgrove.engines.flower.engine import FlowerEngine

    monkeypatch.setattr(FlowerEngine, "trusted", False)
    grid = FakeGrid(3, in_round(2, "site-1", change))
    run_on(grid, tiny_job(tiny_bert, silos, method={"name": "fedit"}), tmp_path / "out")
    (event,) = events(tmp_path / "out")
    assert (event["round"], event["client"], event["event"]) == (2, "site-1", "left out")
    assert words in event["reason"]
    assert "site-1" in trained(tmp_path / "out", 3)
    asked = [decode(blob) for way, blob in grid.blobs if way == "down"]
    starts = [
        note.head["store"] for note in asked if note.kind == "train" and note.head["round"] == 3
    ]
    assert sorted(starts) == [1, 2, 2], "what the server did not take, the client does not build on"


def test_a_clients_traceback_is_seen_at_the_server(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ClientHalf.train

    def fails(self: ClientHalf, client: Any, *rest: Any) -> Any:
        if client.name == "site-2" and rest[-1] == 2:
            raise ZeroDivisionError("a bug at the client")
        return usual(self, client, *rest)

    monkeypatch.setattr(ClientHalf, "train", fails)
    run_on(FakeGrid(3), tiny_job(tiny_bert, silos), tmp_path / "out")
    (event,) = events(tmp_path / "out")
    assert event["reason"] == "Unexpected ZeroDivisionError: a bug at the client."
    assert "in fails" in event["trace"]


def test_a_dead_client_is_left_out_and_comes_back(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    class Outage(StopAfter):
        def round_started(self, round: int, clients: Any) -> None:
            grid.errors = {3: 5} if round == 1 else {}

        def client_done(self, round: int, line: Any) -> None:
            pass

    grid = FakeGrid(3)
    run_on(grid, tiny_job(tiny_bert, silos), tmp_path / "out", callbacks=[Outage(0)])
    assert trained(tmp_path / "out", 1) == {"site-0", "site-1"}
    assert trained(tmp_path / "out", 2) == {"site-0", "site-1", "site-2"}
    assert {event["event"] for event in events(tmp_path / "out")} == {"left out", "not evaluated"}
    assert all("not connected" in event["reason"] for event in events(tmp_path / "out"))


def test_too_few_clients_stop_the_run_which_can_be_resumed(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos, method={"name": "fedsa-lora"}, federation={"min_clients": 3})
    run_on(FakeGrid(3), job, tmp_path / "whole")
    grid = FakeGrid(3, in_round(2, "site-1", spoiled))
    with pytest.raises(
        TooFew, match=r"Round 2 has 2 of the 3 clients .*site-1: .*not finite.*--resume"
    ):
        run_on(grid, job, tmp_path / "cut")
    run_on(FakeGrid(3), job, tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "cut")
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_the_local_engine_leaves_out_what_is_not_finite(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ClientHalf.train_together

    def diverges(self: ClientHalf, turns: Any, round: int) -> Any:
        outcomes = usual(self, turns, round)
        return [
            broken(outcome) if round == 2 and outcome.update.client == "site-0" else outcome
            for outcome in outcomes
        ]

    def broken(outcome: Any) -> Any:
        content = map_tensors(dict(outcome.update.content), lambda tensor: tensor / 0)
        store = map_tensors(outcome.store, lambda tensor: tensor / 0)
        return replace(outcome, update=replace(outcome.update, content=content), store=store)

    monkeypatch.setattr(ClientHalf, "train_together", diverges)
    job = tiny_job(tiny_bert, silos, method={"name": "fedsa-lora"})
    result = run(job, tmp_path / "out")
    assert trained(tmp_path / "out", 2) == {"site-1", "site-2"}
    (event,) = events(tmp_path / "out")
    assert "not finite" in event["reason"]
    assert all(row["loss"] is not None for row in result.summary["clients"].values())
    with pytest.raises(TooFew, match="Round 2 has 2 of the 3"):
        run(job.override(["federation.min_clients=3"]), tmp_path / "strict")


def test_a_late_update_is_dropped_or_used_in_the_next_round(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    found = {}
    for late in ("drop", "next"):
        grid = FakeGrid(3)
        grid.late = {("site-1", 1): 2}
        job = tiny_job(
            tiny_bert, silos, federation={"deadline": 0.3, "late": late}, method={"name": "fedit"}
        )
        run_on(grid, job, tmp_path / late)
        found[late] = [(e["round"], e["client"], e["event"]) for e in events(tmp_path / late)]
        assert trained(tmp_path / late, 1) == {"site-0", "site-2"}
        assert trained(tmp_path / late, 2) == {"site-0", "site-1", "site-2"}
    assert found["drop"] == [(1, "site-1", "left out")]
    assert found["next"] == [(1, "site-1", "left out"), (2, "site-1", "late")]
    assert adapters(tmp_path / "drop") != adapters(tmp_path / "next")


def test_a_late_update_is_refused_where_it_means_nothing(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert, silos, federation={"deadline": 9.0, "late": "next"}, method={"name": "fslora"}
    )
    with pytest.raises(JobError, match=r"federation\.late"):
        run(job, tmp_path / "out")
    with pytest.raises(JobError, match=r"federation\.deadline"):
        tiny_job(tiny_bert, silos, federation={"late": "next"})
    with pytest.raises(JobError, match=r"federation\.min_clients = 3.*draws 2 of 3"):
        run(
            tiny_job(tiny_bert, silos, federation={"min_clients": 3, "fraction": 0.7}),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["fedsa-lora", "hilora"])
def test_a_server_that_was_stopped_resumes_with_its_clients(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "run": {"rounds": 4},
        "federation": {"held_out": ["site-1"]},
        "train": {"cohort": 1},
    }
    job = tiny_job(tiny_bert, silos, method={"name": method}, **changes)
    run(job, tmp_path / "whole")
    for stop in (StopAfter(1), StopAfter(3, 2)):
        with pytest.raises(KeyboardInterrupt):
            run_on(FakeGrid(3), job, tmp_path / "cut", resume=True, callbacks=[stop])
    run_on(FakeGrid(3), job, tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "cut")
    assert summary(tmp_path / "whole") == summary(tmp_path / "cut")
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_clients_keep_only_the_stores_that_the_server_may_come_back_to(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos, method={"name": "fedsa-lora"}, run={"rounds": 5})
    run_on(FakeGrid(3), job, tmp_path / "out")
    kept = {file.name for file in (tmp_path / "out" / "sites").rglob("store-*")}
    assert kept == {"store-00004.safetensors", "store-00005.safetensors"}


def test_another_engine_cannot_go_on(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_bert, silos)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "local", callbacks=[StopAfter(2)])
    with pytest.raises(KeyboardInterrupt):
        run_on(FakeGrid(3), job, tmp_path / "flower", callbacks=[StopAfter(2)])
    with pytest.raises(Exception, match="begun with the local engine"):
        run_on(FakeGrid(3), job, tmp_path / "local", resume=True)
    with pytest.raises(Exception, match="begun with the flower engine"):
        run(job, tmp_path / "flower", resume=True)


def test_what_only_one_process_can_do_is_refused(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=r"run\.noise"):
        run_on(FakeGrid(3), tiny_job(tiny_bert, silos, run={"noise": True}), tmp_path / "out")
    with pytest.raises(Exception, match=r"3 clients, but Flower runs 2 nodes"):
        run_on(FakeGrid(2), tiny_job(tiny_bert, silos), tmp_path / "out")
    with pytest.raises(JobError, match=r"lora\.rank = 64"):
        run_on(FakeGrid(3), tiny_job(tiny_bert, silos, lora={"rank": 64}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
