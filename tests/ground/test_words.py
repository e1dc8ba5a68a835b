from __future__ import annotations

import math

import pytest

from fedgrove.ground import words


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98304, "98 kB"), (999_600, "1.0 MB"), (1_620_000, "1.6 MB"),
     (9_960_000, "10 MB"), (2e15, "2000 TB")],
)  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (125, "2 min 5 s"), (3599.7, "1 h"),
     (4320, "1 h 12 min"), (None, "-"), (math.nan, "-")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


def test_scores_and_changes() -> None:
    assert words.score(0.61249) == "61.2 %"
    assert words.score(0.5) == "50.0 %"
    assert words.score(31.25, percent=False) == "31.250"
    assert words.score(math.nan) == words.score(None) == "-"
    assert words.change(0.013) == "+1.3"
    assert words.change(-0.013) == "-1.3"
    assert words.change(0.0001) == words.change(-0.0001) == "0.0"
    assert words.change(None) == "-"
    assert words.number(None) == words.number(math.nan) == "-"
    assert words.number(0.81234) == "0.812"


def test_counts_and_names() -> None:
    assert words.count(1, "client") == "1 client"
    assert words.count(12288, "client") == "12,288 clients"
    assert words.shorten("short", 10) == "short"
    long = words.shorten("hospital-north-ward-17", 12)
    assert len(long) == 12
    assert long == "hospit…rd-17"


def test_the_page_has_a_real_minus_and_the_terminal_ascii() -> None:
    for text in (
        words.change(-0.5),
        words.MISSING,
        words.score(0.5),
        words.size(10),
        words.duration(100),
    ):
        assert text.isascii()
    assert words.typographic("-1.3") == "−1.3"
    assert words.typographic(words.MISSING) == "–"
    assert words.typographic("61.2 %") == "61.2\u202f%"


def test_a_metric_is_a_percentage_where_all_its_values_are_shares() -> None:
    assert words.shares([0.0, 1.0, None, math.nan])
    assert not words.shares([0.5, 1.01])
    assert not words.shares([-0.1])
