"""What a person reads of a budget: in the report's settings and on each round's line."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from fedgrove.report.facts import settings
from fedgrove.tracking.callback import RunInfo
from fedgrove.tracking.display import PlainProgress

CLIENT = {"epsilon": 3.2149, "delta": 0.0473, "randomness": "secret"}


def told(spent: dict[str, Any] | None) -> str | None:
    summary: dict[str, Any] = {"seed": 0} | ({} if spent is None else {"privacy": spent})
    nothing = {"method": "fedit", "data_name": "", "clients": {}, "newcomers": {}}
    run = SimpleNamespace(summary=summary, setting=lambda *path: None, **nothing)
    return dict(settings(cast(Any, run))).get("privacy")


@pytest.mark.parametrize(
    ("spent", "words"),
    [
        (None, None),
        ({"client": CLIENT, "secure_aggregation": False}, "ε 3.21 at δ 0.047 for a client"),
        (
            {"client": {**CLIENT, "randomness": "seed"}, "secure_aggregation": True},
            "ε 3.21 at δ 0.047 for a client, noise from the seed: an experiment; secure "
            "aggregation",
        ),
        ({"client": {**CLIENT, "epsilon": None}}, "no guarantee for a client (no noise)"),
        ({"example": {"epsilon": 8.0, "randomness": "secret"}}, "ε 8 at most, for an example"),
    ],
)
def test_the_report_says_what_was_spent(spent: Any, words: str | None) -> None:
    assert told(spent) == words


def test_a_rounds_line_tells_epsilon_where_there_is_one() -> None:
    out = io.StringIO()
    display = PlainProgress(Console(file=out, width=200))
    display.run_started(RunInfo("fedit", "FedIT", 2, ("a",), Path("out")))
    for round, summary in ((1, {"epsilon": 1.23456}), (2, {"epsilon": None})):
        display.round_started(round, ["a"])
        display.round_done(round, summary)
    first, second = out.getvalue().splitlines()[-2:]
    assert "epsilon 1.23" in first
    assert "epsilon" not in second
