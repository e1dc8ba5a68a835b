from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgrove.ground.errors import RunError
from fedgrove.tracking.metrics import MetricsLog, metric_name, read, truncate_after


def train(round: int, client: str, loss: float) -> dict[str, Any]:
    return {
        "round": round,
        "client": client,
        "split": "train",
        "loss": loss,
        "examples": 8,
        "seconds": 0.1,
    }


def scored(round: int, client: str, accuracy: float) -> dict[str, Any]:
    return {
        "round": round,
        "client": client,
        "split": "test",
        "loss": 0.9,
        "accuracy": accuracy,
        "examples": 4,
    }


def play(log: MetricsLog, round: int, order: tuple[str, ...]) -> None:
    log.round_started(round, list(order))
    for client in order:
        log.client_done(round, train(round, client, 0.5))
    log.evaluated(round, [scored(round, client, 0.5) for client in order])
    log.round_done(round, {})


def test_the_order_in_which_clients_finish_does_not_show(tmp_path: Path) -> None:
    texts = set()
    for number, order in enumerate(itertools.permutations(("a", "b", "c"))):
        path = tmp_path / f"{number}.jsonl"
        log = MetricsLog(path)
        play(log, 1, order)
        play(log, 2, order)
        texts.add(path.read_bytes())
    assert len(texts) == 1
    lines = [json.loads(line) for line in texts.pop().decode().splitlines()]
    assert [(line["round"], line["client"], line["split"]) for line in lines] == [
        (round, client, split)
        for round in (1, 2)
        for split in ("train", "test")
        for client in ("a", "b", "c")
    ]


def test_a_round_is_on_disk_when_it_is_done_and_not_before(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.round_started(1, ["a"])
    log.client_done(1, train(1, "a", 0.5))
    assert read(log.path) == []
    log.round_done(1, {})
    assert read(log.path) == [train(1, "a", 0.5)]


def test_a_round_that_was_broken_off_leaves_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.round_started(1, ["a", "b"])
    log.client_done(1, train(1, "a", 0.5))
    log.round_started(1, ["b"])
    log.client_done(1, train(1, "b", 0.5))
    log.round_done(1, {})
    assert [line["client"] for line in read(log.path)] == ["b"]


def test_an_evaluation_outside_rounds_is_written_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for _ in range(2):  # a resume repeats what no checkpoint has seen
        log.evaluated(0, [scored(0, "b", 0.5), scored(0, "a", 0.5)])
    assert [line["client"] for line in read(log.path)] == ["a", "b"]
    play(log, 1, ("a",))
    log.evaluated(1, [{**scored(1, "a", 0.5), "split": "tuned"}])
    assert [line["split"] for line in read(log.path)] == ["test", "test", "train", "test", "tuned"]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.round_started(1, ["a"])
    log.client_done(1, train(1, "a", loss=math.nan))
    log.client_done(1, train(1, "b", loss=math.inf))
    log.round_done(1, {})
    assert [line["loss"] for line in read(log.path)] == [None, None]
    assert "NaN" not in log.path.read_text()


def test_floats_survive_exactly(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    value = 0.1 + 0.2
    log.evaluated(0, [scored(0, "a", value)])
    assert repr(value) in log.path.read_text()
    assert read(log.path)[0]["accuracy"] == value


def test_truncating_drops_later_rounds_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for round in (1, 2):
        play(log, round, ("b", "a"))
    kept = log.path.read_bytes()
    play(log, 3, ("a", "b"))
    truncate_after(log.path, 2)
    assert log.path.read_bytes() == kept
    truncate_after(log.path, -1)
    assert log.path.read_bytes() == b""
    truncate_after(tmp_path / "absent.jsonl", 1)
    assert not (tmp_path / "absent.jsonl").exists()


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(st.data())
def test_a_file_cut_anywhere_reads_as_its_complete_lines(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    log = MetricsLog(path)
    for round in (1, 2):
        play(log, round, ("a", "ü"))
    whole, lines = path.read_bytes(), read(path)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    path.write_bytes(cut)
    assert read(path) == lines[: cut.count(b"\n")]
    truncate_after(path, 2)
    assert path.read_bytes() == b"".join(cut.splitlines(keepends=True)[: cut.count(b"\n")])


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        json.dumps(scored(1, "a", 0.5)) + "\n[1]\n" + json.dumps(scored(1, "b", 0.5)) + "\n"
    )
    with pytest.raises(
        RunError, match=r"metrics\.jsonl line 2 is no JSON object with round, client, split"
    ):
        read(path)


def test_a_directory_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match="cannot read"):
        read(tmp_path / "metrics.jsonl")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.round_started(1, ["a"])
    with pytest.raises(RunError, match="cannot write"):
        log.round_done(1, {})


def test_the_metric_is_what_is_no_bookkeeping() -> None:
    assert metric_name(scored(1, "a", 0.5)) == "accuracy"
    assert metric_name(train(1, "a", 0.5)) is None
