"""A site that lies, stays silent or sends what it must not: the run goes on as if it were not
there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from tests.deploy.test_sites import folders, grid, job_for, serve
from tests.engines.grid import FakeGrid, virtual
from tests.engines.test_failures import events, trained
from tests.test_run import adapters, lines

from fedgrove.adapters.private import seal
from fedgrove.adapters.tree import map_tensors, pack
from fedgrove.engines.flower import post
from fedgrove.engines.flower import serve as serving
from fedgrove.engines.flower.post import Post, plain, to_content
from fedgrove.engines.flower.wire import Note, decode, encode

__all__ = ["folders", "grid", "virtual"]
pytestmark = pytest.mark.usefixtures("virtual")
BAD = "site-1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "OTHERS", 0.0)


def to(kind: str, change: Callable[[Note], Any]) -> Any:
    """Alters what one site answers to messages of a kind."""

    def altered(name: str, asked: Note, answer: Note) -> Any:
        return change(answer) if asked.kind == kind and name == BAD else answer

    return altered


def with_head(**values: Any) -> Callable[[Note], Note]:
    return lambda answer: replace(answer, head={**answer.head, **values})


def marked_private(answer: Note) -> bytes:
    """What our own encoding refuses to make."""
    body = map_tensors(answer.body, seal)
    return pack({"kind": answer.kind, "head": dict(answer.head), "body": body}, private=True)


def huge(answer: Note) -> Note:
    return replace(answer, body=map_tensors(answer.body, lambda tensor: tensor * 1e30))


UPDATES: list[tuple[Any, str]] = [
    (marked_private, "marked as private"),
    (huge, "above 1e+06"),
    (lambda answer: b"\xff" * 9, "not a Fedgrove tree"),
    (lambda answer: Note("evaluate", answer.head, {}), "no update"),
    (with_head(steps=10**400), "steps is no usable number"),
]


@pytest.mark.parametrize(("change", "words"), UPDATES)
def test_an_update_that_is_none_costs_nobody_else_anything(
    change: Any, words: str, grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    """A private mark on what goes up is the client's mistake; it must not end the server's run."""
    grid.change = to("train", change)
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2}, run={"rounds": 2})
    found = serve(grid, job, tmp_path / "out")
    assert trained(tmp_path / "out", 2) == {"site-0", "site-2"}
    assert {event["client"] for event in events(tmp_path / "out")} == {BAD}
    assert all(
        words in event["reason"]
        for event in events(tmp_path / "out")
        if event["event"] == "left out"
    )
    assert found.summary["clients"]["site-0"]["metric"] is not None


def row(**changes: Any) -> Callable[[Note], Note]:
    return lambda answer: replace(
        answer, head={**answer.head, "row": {**answer.head["row"], **changes}}
    )


@pytest.mark.parametrize(
    "change",
    [
        row(train=-5),
        row(labels={"negative": 3, "<script>": 1}),
        with_head(row="site-1"),
        with_head(rank=0),
    ],
)
def test_who_does_not_say_properly_who_it_is_is_turned_away(
    change: Any, grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    """Its number of examples would become a weight, its rank a shape, and its words lines of the
    report.
    """
    grid.change = to("hello", change)
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2}, run={"rounds": 1})
    found = serve(grid, job, tmp_path / "out")
    assert set(found.summary["clients"]) == {"site-0", "site-2"}
    (event,) = events(tmp_path / "out")
    assert event["event"] == "refused"
    assert "script" not in (tmp_path / "out" / "federation.json").read_text()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("evaluate", with_head(measures={"round": 99, "loss": 1.0, "accuracy": 1.0})),
        ("evaluate", with_head(measures={"loss": 1.0})),
        ("finish", with_head(row={"loss": 1.0, "metric_base": 0.5})),
        ("finish", with_head(stored=10**400)),
    ],
)
def test_measures_that_are_none_end_no_run(
    kind: str, change: Any, grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    grid.change = to(kind, change)
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2}, run={"rounds": 1})
    found = serve(grid, job, tmp_path / "out")
    (event,) = events(tmp_path / "out")
    assert (event["client"], "are refused" in event["reason"]) == (BAD, True)
    assert {line["client"] for line in lines(tmp_path / "out") if line["round"] != 1} == set()
    assert (BAD in found.summary["clients"]) == (kind == "evaluate")


def test_the_words_of_an_error_reach_the_log_without_orders_to_a_terminal(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    words = "\x1b[2J\x1b]0;owned\x07 out of memory\r" + "x" * 100_000
    grid.change = to("train", lambda answer: Note("error", {"sentence": words, "trace": words}))
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2}, run={"rounds": 1})
    serve(grid, job, tmp_path / "out")
    event = events(tmp_path / "out")[0]
    assert "out of memory" in event["reason"]
    assert not set(event["reason"] + event["trace"]) & {"\x1b", "\x07", "\r"}
    assert len(json.dumps(event)) < 10_000
    assert plain("a\nb\u202ec\x00", 3) == "a\nb"


# ------------------------------------------------------------ silence
def test_a_site_that_never_says_hello_keeps_nobody_waiting(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    grid.change = to("hello", lambda answer: None)
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2})
    found = serve(grid, job, tmp_path / "out")
    assert set(found.summary["clients"]) == {"site-0", "site-2"}
    assert events(tmp_path / "out") == []


def test_a_late_site_that_never_loads_the_model_keeps_nobody_waiting(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    from tests.deploy.test_sites import Appear

    grid.online.discard(2)
    grid.change = to("open", lambda answer: None)
    job = job_for(tiny_bert, tmp_path, federation={"min_clients": 2})
    found = serve(grid, job, tmp_path / "out", callbacks=[Appear(grid, 2, 2)])
    assert set(found.summary["clients"]) == {"site-0", "site-2"}


@pytest.mark.parametrize("kind", ["hello", "train", "finish"])
def test_a_message_that_got_lost_is_sent_again(
    kind: str, grid: FakeGrid, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a deadline the run would wait for ever; and it is the run that it would have been."""
    monkeypatch.setattr(post, "QUIET", 0.01)
    job = job_for(tiny_bert, tmp_path, method={"name": "fedsa-lora"}, run={"rounds": 2})
    from fedgrove.start import run

    run(job, tmp_path / "local")
    lost: list[Note] = []

    def once(answer: Note) -> Note | None:
        lost.append(answer)
        return None if len(lost) == 1 else answer

    grid.change = to(kind, once)
    serve(grid, job, tmp_path / "out")
    assert len(lost) > 1
    assert lines(tmp_path / "out") == lines(tmp_path / "local")
    home = next((tmp_path / "sites" / BAD / "runs").glob("*/adapters/*/adapter_model.safetensors"))
    assert home.read_bytes() == next(
        content
        for path, content in adapters(tmp_path / "local").items()
        if BAD in path and path.endswith(home.name)
    )


class Echo(FakeGrid):
    """Gives every answer twice, and some that nobody asked for."""

    def pull_messages(self, message_ids: Any) -> Any:
        found = list(super().pull_messages(message_ids))
        for message in found:
            strange = Message(to_content(encode(Note("train", {}, {}))), reply_to=message)
            strange.metadata.__dict__["_reply_to_message_id"] = "m999"
            self._again = [*getattr(self, "_again", []), message, strange]
        return [*getattr(self, "_again", []), *found]


def test_answers_that_are_played_again_count_once(
    folders: list[Path], tiny_bert: Path, tmp_path: Path
) -> None:
    from fedgrove.start import run

    job = job_for(tiny_bert, tmp_path, run={"rounds": 3})
    run(job, tmp_path / "local")
    echo = Echo(
        3, configs={index + 1: {"site": str(folder)} for index, folder in enumerate(folders)}
    )
    serve(echo, job, tmp_path / "out")
    assert lines(tmp_path / "out") == lines(tmp_path / "local")


def test_a_post_that_does_not_send_again_waits(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a simulation messages are not answered in order, so an answer to a later one says
    nothing.
    """
    monkeypatch.setattr(post, "QUIET", 0.0)
    grid = FakeGrid(1, configs={1: {}})
    grid.change = lambda name, asked, answer: None
    for again, kinds in ((False, {"hello"}), (True, {"hello", "here"})):
        grid.blobs.clear()
        mail = Post(grid, again=again)
        sent = mail.send(1, Note("hello", {"run": "a"}))
        assert list(mail.collect([sent], seconds=0.05)) == []
        assert {decode(blob).kind for way, blob in grid.blobs if way == "down"} == kinds


def test_a_needed_site_that_goes_away_with_the_message_is_waited_for(
    grid: FakeGrid, tiny_bert: Path, tmp_path: Path
) -> None:
    """Its node is gone when the answer is due, and back a little later; the run is as if it had
    stayed.
    """
    from fedgrove.start import run

    job = job_for(tiny_bert, tmp_path, method={"name": "fedsa-lora"}, run={"rounds": 2})
    run(job, tmp_path / "local")
    asked: list[str] = []
    push = grid.push_messages

    def flaky(messages: Any) -> Any:
        messages = list(messages)
        kinds = [
            message.metadata.message_type
            for message in messages
            if message.metadata.dst_node_id == 2
        ]
        asked.extend(kinds)
        away = [kind for kind in kinds if kind != "query.hello" and asked.count(kind) == 1]
        grid.errors = {2: 5} if away and away != ["query.open"] else {}
        return push(messages)

    grid.push_messages = flaky  # type: ignore[method-assign]
    serve(grid, job, tmp_path / "out")
    assert lines(tmp_path / "out") == lines(tmp_path / "local")
    assert [event["event"] for event in events(tmp_path / "out")] == ["away"]
    assert (asked.count("train"), asked.count("evaluate"), asked.count("query.finish")) == (3, 3, 2)
