"""What ``fedgrove data`` says: few labels as columns, many in short, and nothing that nobody
has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedgrove.federation.federation import Client, Federation
from fedgrove.federation.overview import Overview, overview

SOURCE = {
    "source": "table",
    "name": "t.csv",
    "note": "the file t.csv",
    "licence": "the owner's",
    "sha256": "",
}


def federation(*clients: tuple[str, Sequence[str]], **changes: Any) -> Federation:
    """Clients with a training row for each label and one test row."""
    labels = tuple(sorted({label for _, held in clients for label in held}))
    rows = [
        Client(
            name,
            [{"text": "two words", "label": label} for label in held],
            [{"text": "a", "label": held[0]}],
            **{"validation": [], "group": None, "held_out": False, **changes},
        )
        for name, held in clients
    ]
    return Federation(tuple(rows), labels, SOURCE)


def columns(found: Overview) -> dict[str, list[str]]:
    return dict(zip(found.headings, map(list, zip(*found.rows, strict=True)), strict=True))


def test_few_labels_have_columns() -> None:
    found = overview(federation(("a", "xxy"), ("b", "z")), {}, 128)
    assert columns(found) == {
        "client": ["a", "b"], "train": ["3", "1"], "test": ["1", "1"], "x": ["2", "0"], "y": ["1", "0"],
        "z": ["0", "1"], "median words": ["2", "2"],
    }  # fmt: skip
    assert found.sentences == [
        "2 clients, 4 training, 2 test rows, 3 labels.",
        "Data: t.csv, the file t.csv (licence: the owner's).",
    ]


def test_many_labels_are_told_in_short() -> None:
    found = columns(overview(federation(("a", "abcdefghijjjcc"), ("b", "yy")), {}, 128))
    assert found["labels"] == ["10", "1"]
    assert found["most frequent"] == ["c 3, j 3, a 1, …", "y 2"]
    assert "a" not in found
    assert "j" in columns(overview(federation(("a", "abcdefgj")), {}, 128))


def test_groups_validation_and_held_out_where_there_are_any() -> None:
    row = {"text": "a", "label": "x"}
    found = overview(
        federation(("a", "xy"), group="north", validation=[row], held_out=True), {}, 128
    )
    shown = columns(found)
    assert (shown["client"], shown["group"], shown["validation"]) == (
        ["a (held out)"],
        ["north"],
        ["1"],
    )
    assert (
        found.sentences[0]
        == "1 client (1 held out), 2 training, 1 validation, 1 test rows, 2 labels."
    )


def test_tokens_are_told_where_they_were_counted() -> None:
    tokens = {"a": {"median": 12.5, "p95": 90.0, "longest": 200, "cut": 3}}
    found = columns(overview(federation(("a", "xy")), tokens, 100))
    assert (found["median tokens"], found["p95"], found["over 100"]) == (["12.5"], ["90"], ["3"])


def test_a_label_may_be_called_like_a_column() -> None:
    found = overview(federation(("a", ["train", "test", "test"])), {}, 128)
    assert found.headings == ["client", "train", "test", "test", "train", "median words"]
    assert found.rows == [["a", "3", "1", "2", "1", "2"]]


def test_texts_without_labels_are_told_by_the_column_that_split_them() -> None:
    rows = [{"text": "two words", "label": ""}] * 3
    clients = [
        Client(name, rows, rows[:1], [], None, held_out=False, kinds=kinds)
        for name, kinds in (("a", {"riddles": 2, "sums": 1}), ("b", {"sums": 3}))
    ]
    found = columns(overview(Federation(tuple(clients), (), SOURCE), {}, 128))
    assert (found["riddles"], found["sums"]) == (["2", "0"], ["1", "3"])
    kinds = {"a" * 40: 5, **dict.fromkeys("bcdefghi", 1)}
    many = [Client("a", rows, rows[:1], [], None, held_out=False, kinds=kinds)]
    found = columns(overview(Federation(tuple(many), (), SOURCE, kind="task"), {}, 128))
    assert (found["kinds of task"], found["most frequent"]) == (
        ["9"],
        ["a" * 27 + "… 5, b 1, c 1, …"],
    )
