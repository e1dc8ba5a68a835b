"""Which plain figures may come over the wire."""

from __future__ import annotations

from typing import Any

import pytest

from fedgrove.wire.figures import figures_fault, measures_fault, row_fault

ROW = {
    "name": "a",
    "group": None,
    "held_out": False,
    "train": 7,
    "test": 3,
    "validation": 0,
    "labels": {"x": 4, "y": 3},
}


def test_an_honest_description_passes() -> None:
    for row in (ROW, {**ROW, "median_words": 7.5}, {"name": "a", "train": 1}):
        assert row_fault(row, 4, ("x", "y")) is None
        assert row_fault(row, None, ("x", "y", "z")) is None


@pytest.mark.parametrize(
    ("changes", "rank", "words"),
    [
        ({"train": 0}, 4, "0 examples"),
        ({"train": -5}, 4, "-5 examples"),
        ({"train": True}, 4, "True examples"),
        ({"train": 10**30}, 4, "examples"),
        ({"train": 7.0}, 4, "7.0 examples"),
        ({"name": "../../a"}, 4, "its name"),
        ({"name": "<b>a</b>"}, 4, "its name"),
        ({"name": 7}, 4, "who it is"),
        ({"labels": {"x": 1, "<script>": 1}}, 4, "its labels"),
        ({"labels": {"x": "many"}}, 4, "its labels"),
        ({"test": "x" * 1000}, 4, "'test'"),
        ({"group": ["a"]}, 4, "'group'"),
        ({"more": {"a": 1}}, 4, "'more'"),
        ({}, 0, "the rank 0"),
        ({}, "4", "the rank 4"),
        ({}, True, "the rank True"),
        ({}, 10**30, "the rank 1"),
    ],
)
def test_a_description_that_is_none_is_named(changes: Any, rank: Any, words: str) -> None:
    assert words in (row_fault({**ROW, **changes}, rank, ("x", "y")) or "")


def test_measures_are_numbers_under_known_names() -> None:
    needed = {"loss", "accuracy"}
    fine: dict[str, Any] = {"loss": float("nan"), "accuracy": 0.5, "examples": 3}
    assert measures_fault(fine, needed=needed) is None
    more: dict[str, Any]
    for more in (
        {"round": 9},
        {"client": 1},
        {"split": 2},
        {"a b": 1},
        {"accuracy": "all"},
        {"accuracy": None},
    ):
        assert measures_fault({**fine, **more}, needed=needed), more
    for more in ({"accuracy": 10**400}, {"accuracy": True}, {f"m{n}": n for n in range(20)}):
        assert measures_fault({**fine, **more}, needed=needed), more
    assert "no accuracy" in (measures_fault({"loss": 1.0}, needed=needed) or "")
    assert "no accuracy, loss" in (measures_fault(None, needed=needed) or "")
    assert measures_fault({**fine, "rank": 3}, needed=needed, known=needed)
    assert measures_fault({"loss": None, "accuracy": None}, needed=needed, known=needed) is None


def test_figures_are_numbers_that_can_be_written_down() -> None:
    assert figures_fault(steps=3, seconds=0.1) is None
    for wrong_one in (-1, float("nan"), float("inf"), 10**400, True, None, "3"):
        assert figures_fault(steps=1, seconds=wrong_one) == "seconds is no usable number"
