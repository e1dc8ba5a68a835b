from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgrove.federation import Federation, build
from fedgrove.ground.errors import DataError, JobError
from fedgrove.job import Job

MakeJob = Callable[..., Job]
WriteRows = Callable[[Path, list[dict[str, Any]]], Path]
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def silos(make_job: MakeJob, tmp_path: Path, write_rows: WriteRows) -> Callable[..., Federation]:
    """``silos({"a": rows, ...}, settings...)``: the federation of these clients."""

    def make(clients: dict[str, list[dict[str, Any]]], *settings: str) -> Federation:
        folder = tmp_path / "silos"
        shutil.rmtree(folder, ignore_errors=True)
        for name, rows in clients.items():
            write_rows(folder / f"{name}.jsonl", rows)
        return build(make_job("data.source=silos", f"data.path='{folder}'", *settings))

    return make


def test_silos_become_clients(silos: Callable[..., Federation], rows: Rows) -> None:
    federation = silos({"b": rows(8), "a": rows(12, "ab", "other")})
    assert [client.name for client in federation.clients] == ["a", "b"]
    assert federation.labels == ("a", "b")
    a, b = federation.clients
    assert (len(a.train), len(a.test), len(a.validation)) == (9, 3, 0)
    assert (len(b.train), len(b.test), len(b.validation)) == (6, 2, 0)
    assert (a.group, a.held_out) == (None, False)
    assert federation.training == federation.clients
    assert federation.held_out == ()


def test_the_same_job_gives_the_same_federation_whatever_order_files_have(
    silos: Callable[..., Federation], rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = {name: rows(20, "abc", name) for name in ("c", "a", "b", "d", "e")}
    first = silos(clients, "federation.held_out=0.4")
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(listed(self), reverse=True))
    again = silos(dict(reversed(clients.items())), "federation.held_out=0.4")
    assert again == first
    assert silos(clients, "federation.held_out=0.4", "run.seed=1") != first


def test_caps_and_validation(silos: Callable[..., Federation], rows: Rows) -> None:
    settings = (
        "data.train_examples=5",
        "data.test_examples=3",
        "data.validation_fraction=0.25",
        "data.test_fraction=0.5",
    )
    (client,) = silos({"a": rows(40)}, *settings).clients
    assert (len(client.train), len(client.test), len(client.validation)) == (5, 3, 10)


def test_labels_have_a_natural_order_or_the_jobs(silos: Callable[..., Federation]) -> None:
    data = [{"text": f"t {i}", "label": label} for i, label in enumerate([10, 9, -1, "b", "a"] * 4)]
    assert silos({"a": data}).labels == ("-1", "9", "10", "a", "b")
    named = silos({"a": data}, "data.labels=['b', '9', '10', 'a', 'spare', '-1']")
    assert named.labels == ("b", "9", "10", "a", "spare", "-1")


def test_a_class_that_falls_to_nobody_is_a_class_all_the_same(
    make_job: MakeJob, write_rows: WriteRows, rows: Rows, tmp_path: Path
) -> None:
    """A job that names the classes found gives the same federation again."""
    write_rows(tmp_path / "table.jsonl", rows(200, "abcdefgh"))
    job = make_job(
        "data.source=table", f"data.path='{tmp_path / 'table.jsonl'}'", "federation.clients=2",
        "data.partition.by=pathological",
        "data.partition.options={num_classes_per_partition = 2, class_assignment_mode = 'random'}",
    )  # fmt: skip
    first = build(job)
    held = {row["label"] for client in first.clients for row in client.train}
    assert len(held) <= 4
    assert first.labels == tuple("abcdefgh")
    assert build(job.replace(data={"labels": list(first.labels)})) == first


def test_the_table_for_the_report(silos: Callable[..., Federation]) -> None:
    data = [{"text": "one two three", "label": "x", "site": "north"}] * 6 + [
        {"text": "one", "label": "y", "site": "north"}
    ] * 2
    other = [{"text": "one two", "label": "xy"[i % 2], "site": "south"} for i in range(8)]
    federation = silos({"a": data, "b": other}, "data.group=site", "federation.held_out=['b']")
    assert federation.table() == {
        "labels": ["x", "y"],
        "clients": [
            {
                "name": "a",
                "group": "north",
                "held_out": False,
                "train": 6,
                "test": 2,
                "validation": 0,
                "labels": {"x": 4, "y": 2},
                "median_words": 3,
            },
            {
                "name": "b",
                "group": "south",
                "held_out": True,
                "train": 6,
                "test": 2,
                "validation": 0,
                "labels": {"x": 3, "y": 3},
                "median_words": 2,
            },
        ],
    }


def test_held_out_by_name_and_by_share(silos: Callable[..., Federation], rows: Rows) -> None:
    clients = {name: rows(8) for name in "abcdefgh"}
    named = silos(clients, "federation.held_out=['c', 'a']")
    assert [client.name for client in named.held_out] == ["a", "c"]
    assert len(named.training) == 6
    drawn = {
        seed: silos(clients, "federation.held_out=0.25", f"run.seed={seed}").held_out
        for seed in range(4)
    }
    assert {len(chosen) for chosen in drawn.values()} == {2}
    assert len({tuple(client.name for client in chosen) for chosen in drawn.values()}) > 1
    assert len(silos(clients, "federation.held_out=0.01").held_out) == 1
    with pytest.raises(
        JobError, match=r"federation.held_out names 'z', which is no client; there are: a, b, c"
    ):
        silos(clients, "federation.held_out=['z']")
    with pytest.raises(JobError, match="leaves no client to train"):
        silos({"a": rows(8), "b": rows(8)}, "federation.held_out=['a', 'b']")
    with pytest.raises(JobError, match="leaves no client to train"):
        silos({"a": rows(8)}, "federation.held_out=0.9")


def test_the_draw_leaves_every_label_to_someone_who_trains(
    silos: Callable[..., Federation], rows: Rows
) -> None:
    clients = {"a": rows(8, "ab"), "b": rows(8, "ab"), "c": rows(8, "abc")}
    for seed in range(6):
        assert "c" not in {
            client.name
            for client in silos(clients, "federation.held_out=0.34", f"run.seed={seed}").held_out
        }
    only = {"a": rows(8, "ab"), "b": rows(8, "cd"), "c": rows(8, "ef")}
    with pytest.raises(
        JobError, match=r"held_out = 0\.34 would hold out 1 clients, but after 0 every other one"
    ):
        silos(only, "federation.held_out=0.34")


def test_a_label_that_nobody_trains_on(silos: Callable[..., Federation], rows: Rows) -> None:
    clients = {"a": rows(8, "ab"), "b": rows(8, "abc")}
    with pytest.raises(
        DataError,
        match="the label 'c' of the client 'b' occurs only in test, validation or held-out rows",
    ):
        silos(clients, "federation.held_out=['b']")
    assert silos(clients, "federation.held_out=['b']", "data.labels=['a', 'b', 'c']").labels == (
        "a",
        "b",
        "c",
    )
    with pytest.raises(DataError, match=r"the label '.' of the client 'a' occurs only in test"):
        silos({"a": rows(2, "xy"), "b": rows(8)})


def test_a_label_of_one_row_is_trained_on(silos: Callable[..., Federation], rows: Rows) -> None:
    data = [*rows(20), {"text": "rare", "label": "rare"}]
    assert "rare" in {row["label"] for row in silos({"a": data}).clients[0].train}


def test_one_label_is_nothing_to_classify(silos: Callable[..., Federation], rows: Rows) -> None:
    with pytest.raises(DataError, match="all training rows have the one label 'a'"):
        silos({"a": rows(8, "a"), "b": rows(8, "a")})


def test_a_client_with_too_little_is_named(silos: Callable[..., Federation], rows: Rows) -> None:
    with pytest.raises(DataError, match="the client 'small' has 1 row and needs at least 2"):
        silos({"a": rows(8), "small": rows(1)})


def test_a_table_is_split_into_clients(
    make_job: MakeJob, tmp_path: Path, write_rows: WriteRows, rows: Rows
) -> None:
    path = write_rows(
        tmp_path / "t.jsonl",
        [row | {"site": "ns"[i % 3 > 0]} for i, row in enumerate(rows(90, "abc"))],
    )
    settings = (
        "data.source=table",
        f"data.path='{path}'",
        "data.group=site",
        "federation.clients=5",
    )
    federation = build(make_job(*settings, "data.partition.by=iid"))
    assert [(client.name, client.group) for client in federation.clients] == [
        ("n-0", "n"),
        ("n-1", "n"),
        ("s-0", "s"),
        ("s-1", "s"),
        ("s-2", "s"),
    ]
    with pytest.raises(
        DataError,
        match=r"the client 'n-00' has 1 row and needs .*use fewer clients or another data.partition",
    ):
        build(make_job(*settings[:3], "federation.clients=60", "data.partition.by=iid"))


@pytest.mark.skipif(
    bool(os.environ.get("FEDGROVE_OFFLINE")),
    reason="FEDGROVE_OFFLINE is set: the data may be missing",
)
def test_the_default_job() -> None:
    job = (
        Job.default()
        if hasattr(Job, "default")
        else Job.parse('[data]\ngroup = "domain"\ntrain_examples = 60\n')
    )
    federation = build(job)
    assert len(federation.clients) == 16
    assert [client.name for client in federation.clients[:5]] == [
        "amazon-0",
        "amazon-1",
        "amazon-2",
        "amazon-3",
        "films-0",
    ]
    assert federation.labels == ("negative", "neutral", "positive")
    assert {len(client.train) for client in federation.clients} == {60}
    everything = [
        row["text"] for client in federation.clients for row in client.train + client.test
    ]
    assert len(everything) == len(set(everything))


def test_labels_that_differ_in_case_alone_are_a_mistake_unless_they_are_named(
    silos: Callable[..., Federation],
) -> None:
    data = [{"text": f"t {i}", "label": ("cat", "dog", "Cat")[i % 3]} for i in range(24)]
    with pytest.raises(DataError, match="the labels 'Cat' and 'cat' differ in case alone"):
        silos({"a": data})
    assert silos({"a": data}, "data.labels=['cat', 'dog', 'Cat']").labels == ("cat", "dog", "Cat")
