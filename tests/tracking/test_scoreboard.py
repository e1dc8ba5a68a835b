from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fedgrove.tracking.callback import RunInfo
from fedgrove.tracking.scoreboard import Scoreboard


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def board(clock: Clock, *, rounds: int = 4, start_round: int = 1) -> Scoreboard:
    return Scoreboard(
        RunInfo("fedit", "title", rounds, ("a", "b"), Path("run"), start_round=start_round), clock
    )


def scores(round: int, **values: float | None) -> list[dict[str, Any]]:
    return [
        {
            "round": round,
            "client": name,
            "split": "test",
            "loss": 1.0,
            "accuracy": value,
            "examples": 10,
        }
        for name, value in values.items()
    ]


def test_time_left_follows_the_pace_and_counts_clients_inside_a_round() -> None:
    clock = Clock()
    each = board(clock)
    assert each.seconds_left() is None
    each.start_round(1, ["a", "b"])
    clock.now += 10
    assert each.seconds_left() is None
    each.client({"loss": 0.5})
    assert each.seconds_left() == pytest.approx(
        70
    )  # half a round took 10 s, three and a half are left
    clock.now += 10
    each.client({"loss": 0.5})
    each.end_round()
    assert each.round_seconds == 20
    assert each.seconds_left() == pytest.approx(60)
    each.start_round(2, ["a", "b"])
    assert each.seconds_left() == pytest.approx(60)


def test_after_a_resume_only_this_session_counts() -> None:
    clock = Clock()
    each = board(clock, rounds=10, start_round=9)
    each.start_round(9, ["a"])
    clock.now += 30
    each.client({"loss": 0.5})
    each.end_round()
    assert each.seconds_left() == pytest.approx(30)


def test_losses_and_bytes() -> None:
    each = board(Clock())
    each.start_round(1, ["a", "b"])
    each.client({"loss": 1.0, "bytes_up": 10, "bytes_down": 1})
    each.client({"loss": math.nan, "bytes_up": 10, "bytes_down": 1})
    assert each.loss == 1.0
    each.end_round()
    each.start_round(2, ["a"])
    each.client({"loss": 3.0, "bytes_up": 10, "bytes_down": 1})
    assert each.loss == 3.0
    assert (each.bytes_up, each.bytes_down) == (30, 3)


def test_scores_are_over_the_clients_that_train() -> None:
    each = board(Clock())
    score = each.evaluate(1, scores(1, a=0.5, b=1.0, held_out=0.0))
    assert score is not None
    assert (score.mean, score.metric, score.percent) == (0.75, "accuracy", True)
    assert score.tail == pytest.approx(0.55)
    assert score.mean_change is None
    second = each.evaluate(2, scores(2, a=0.25, b=1.0))
    assert second is not None
    assert second.mean_change == pytest.approx(-0.125)
    assert second.tail_change == pytest.approx(0.325 - 0.55)
    assert each.best is score
    third = each.evaluate(3, scores(3, a=1.0, b=1.0))
    assert each.best is third


def test_a_score_that_is_no_number_is_no_best() -> None:
    each = board(Clock())
    each.evaluate(1, scores(1, a=None, b=None))
    good = each.evaluate(2, scores(2, a=0.5, b=0.5))
    assert good is not None
    assert each.best is good
    assert good.mean_change is None
    each.evaluate(3, scores(3, a=None, b=None))
    assert each.best is good


def test_lines_without_a_metric_are_no_evaluation() -> None:
    assert (
        board(Clock()).evaluate(1, [{"round": 1, "client": "a", "split": "test", "loss": 1.0}])
        is None
    )
    assert board(Clock()).evaluate(1, []) is None
