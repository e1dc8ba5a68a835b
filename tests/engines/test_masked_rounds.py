"""Masked rounds over messages: a client lost at any exchange, one that lies, and a resumed run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines.grid import Change, FakeGrid, run_on, virtual
from tests.stops import StopAfter
from tests.test_run import adapters, lines
from tests.tiny import tiny_job, without_reports

from fedgrove.engines.flower.engine import FlowerEngine
from fedgrove.engines.flower.wire import Note, decode
from fedgrove.ground.errors import FedgroveError
from fedgrove.privacy.masked import MASKED

__all__ = ["virtual"]
pytestmark = pytest.mark.usefixtures("virtual")


@pytest.fixture(autouse=True)
def no_report() -> Any:
    with without_reports():
        yield


def job_of(bert: Path, silos: Path, secure: bool = True, /, **changes: dict[str, Any]) -> Any:
    values: dict[str, dict[str, Any]] = {
        "method": {"name": "fedit", "weights": "uniform"},
        "federation": {"head": "shared", "min_clients": 2, "deadline": 0.3},
        "privacy": {"clip": 5.0, "secure_aggregation": secure},
        "train": {"optimizer": "sgd", "lr": 0.05, "cohort": 1},
        "run": {"rounds": 2},
    }
    for section, keys in changes.items():
        values[section] |= keys
    return tiny_job(bert, silos, **values)


def losing(who: str, kind: str, round: int = 1) -> Change:
    """One client's answer to one message never comes."""

    def change(client: str, asked: Note, answer: Note) -> Note | None:
        gone = (client, asked.kind, asked.head.get("round")) == (who, kind, round)
        return None if gone else answer

    return change


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(grid: FakeGrid) -> list[Note]:
    notes = [decode(blob) for direction, blob in grid.blobs if direction == "up"]
    return [note for note in notes if note.kind == "train"]


@pytest.mark.parametrize("kind", ["keys", "shares", "train", "unmask"])
def test_a_client_lost_at_any_exchange_is_left_out_and_the_others_count(
    kind: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """Lost before its update: the mean is that of the other two. Lost after it: that of all three."""
    grid = FakeGrid(3, losing("site-1", kind))
    run_on(grid, job_of(tiny_bert, silos), tmp_path / "secure")
    plain = FakeGrid(3, None if kind == "unmask" else losing("site-1", "train"))
    run_on(plain, job_of(tiny_bert, silos, False), tmp_path / "plain")
    ours, theirs = lines(tmp_path / "secure"), lines(tmp_path / "plain")
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-4)
    sent = trained(grid)
    assert all(set(note.body["update"]) == {MASKED} for note in sent)
    assert all(note.body["update"][MASKED].dtype == torch.int32 for note in sent)
    told = [each for each in read(tmp_path / "secure" / "events.jsonl") if each["round"] == 1]
    assert [each["client"] for each in told] == ([] if kind == "unmask" else ["site-1"])


def test_who_is_waited_for_in_vain_takes_no_time_from_the_training(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training has a deadline of its own, from when the exchanges before it are over."""
    order: list[str] = []
    meet, deadline = FlowerEngine._meet, FlowerEngine._deadline

    def met(self: FlowerEngine, *arguments: Any) -> Any:
        yield from meet(self, *arguments)
        order.append("met")

    def until(self: FlowerEngine) -> float | None:
        order.append("deadline")
        return deadline(self)

    monkeypatch.setattr(FlowerEngine, "_meet", met)
    monkeypatch.setattr(FlowerEngine, "_deadline", until)
    run_on(FakeGrid(3), job_of(tiny_bert, silos, run={"rounds": 1}), tmp_path / "out")
    assert order[order.index("met") + 1 :] == ["deadline"]


@pytest.mark.parametrize("kind", ["keys", "shares", "train", "unmask"])
def test_below_the_threshold_the_run_stops_with_a_sentence_and_goes_on_later(
    kind: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    def change(client: str, asked: Note, answer: Note) -> Note | None:
        return (
            None
            if client != "site-0" and asked.kind == kind and asked.head["round"] == 2
            else answer
        )

    job = job_of(tiny_bert, silos, federation={"min_clients": 1})
    with pytest.raises(FedgroveError, match=r"1 of 3 clients.*asks for 2; nothing was learnt"):
        run_on(FakeGrid(3, change), job, tmp_path / "out")
    run_on(FakeGrid(3), job, tmp_path / "out", resume=True)
    run_on(FakeGrid(3), job, tmp_path / "whole")
    assert adapters(tmp_path / "out") == adapters(tmp_path / "whole")


def shorter(note: Note) -> Note:
    note.body["update"][MASKED] = note.body["update"][MASKED][:-1]
    return note


def as_floats(note: Note) -> Note:
    note.body["update"][MASKED] = note.body["update"][MASKED].double()
    return note


def unmasked(note: Note) -> Note:
    note.body["update"] = {"method": {"adapter": {}}}
    return note


def other_name(note: Note) -> Note:
    note.head["advert"]["name"] = "site-0"
    return note


def no_keys(note: Note) -> Note:
    note.head["advert"]["mask"] = "none"
    return note


def not_for_all(note: Note) -> Note:
    note.head["parcels"]["locked"].popitem()
    return note


def of_no_kind(note: Note) -> Note:
    note.head["parcels"]["more"] = 1
    return note


@pytest.mark.parametrize(
    ("kind", "lie", "words"),
    [
        ("train", shorter, "its masked vector has not the"),
        ("train", as_floats, "its masked vector has not the"),
        ("train", unmasked, "it is not masked"),
        ("keys", other_name, "under another name"),
        ("keys", no_keys, "its keys are none"),
        ("shares", not_for_all, "not for its neighbours"),
        ("shares", of_no_kind, "is no field of Parcels"),
    ],
)
def test_a_client_that_lies_is_left_out(
    kind: str, lie: Any, words: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    def change(client: str, asked: Note, answer: Note) -> Note:
        return lie(answer) if client == "site-1" and asked.kind == kind else answer

    run_on(FakeGrid(3, change), job_of(tiny_bert, silos, run={"rounds": 1}), tmp_path / "out")
    (event,) = read(tmp_path / "out" / "events.jsonl")
    assert event["client"] == "site-1"
    assert words in event["reason"]


def test_a_masked_run_resumes_to_the_same_numbers(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = job_of(tiny_bert, silos, run={"rounds": 3})
    with pytest.raises(KeyboardInterrupt):
        run_on(FakeGrid(3), job, tmp_path / "cut", callbacks=[StopAfter(2)])
    run_on(FakeGrid(3), job, tmp_path / "cut", resume=True)
    run_on(FakeGrid(3), job, tmp_path / "whole")
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "cut")
    assert not list((tmp_path / "whole").rglob("masks.json")), "the last round's secrets are gone"
