"""The noise lab's pictures on lines of every kind: exact zeros, no global model, one round, no
pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgrove.ground.lines import append
from fedgrove.report import style
from fedgrove.report.pictures.noise import cosines, losses, mean_matrix, noise, places, site_name
from fedgrove.report.sections import Left

SITES = [
    f"encoder.layer.{layer}.attention.self.{name}"
    for layer in range(3)
    for name in ("query", "value")
]


def line(round: int, **changes: Any) -> dict[str, Any]:
    each = {
        "n_init": 0.0,
        "n_agg": 0.02 / round,
        "bound": 0.1,
        "n_init_adapter": 0.0,
        "cos_same": 0.5,
        "cos_other": -0.01,
    }
    each |= changes
    return {"round": round, **each, "sites": {site: dict(each) for site in SITES}}


@pytest.fixture
def lab(tmp_path: Path) -> Callable[..., Path]:
    def write(rounds: int, rank: int = 4, **changes: Any) -> Path:
        for round in range(1, rounds + 1):
            append(tmp_path / "noise.jsonl", line(round, **changes))
            matrix = [[None if i == 3 else float(i == j) for j in range(rank)] for i in range(rank)]
            append(tmp_path / "cosines.jsonl", {"round": round, "matrix": matrix})
        return tmp_path

    return write


def drawn(run_dir: Path) -> list[str]:
    """The titles of the sections, after every figure was drawn for a page and for a phone."""
    titles = []
    with style.applied():
        for found in noise(Left(run_dir)):
            assert callable(found.figure)
            for width in (style.WIDE, style.NARROW):
                assert style.svg(found.figure(width), "x", found.title).startswith("<svg")
            titles.append(found.title)
    return titles


def test_three_sections_say_what_is_lost_where_and_whether_indices_agree(
    lab: Callable[..., Path],
) -> None:
    run_dir = lab(5)
    assert len(drawn(run_dir)) == 3
    texts = [found.text for found in noise(Left(run_dir))]
    assert "exactly 0 in all 5 rounds" in texts[0]
    assert "0.50 for the same index, −0.01 for different ones" in texts[2]


@pytest.mark.parametrize(
    ("rounds", "changes", "sections", "words"),
    [
        (1, {}, 2, "exactly 0 in the one round"),
        (3, {"n_agg": 0.0, "bound": 0.0}, 2, "nothing but rounding"),
        (3, {"n_agg": 3e-9, "bound": None, "n_init_adapter": 4.1}, 2, "Its adapter alone"),
        (
            3,
            {"n_init": 0.3, "n_init_adapter": 0.3, "bound": None},
            3,
            "On the way down a client loses 0.3 on average.",
        ),
        (60, {"n_agg": 1e3, "bound": 1e9}, 3, "loses 1.0e3 on average"),
    ],
)
def test_every_kind_of_run_is_drawn(
    lab: Callable[..., Path], rounds: int, changes: Any, sections: int, words: str
) -> None:
    run_dir = lab(rounds, **changes)
    assert len(drawn(run_dir)) == sections
    assert words in noise(Left(run_dir))[0].text


def test_without_a_global_model_there_are_only_cosines(lab: Callable[..., Path]) -> None:
    nothing = dict.fromkeys(("n_init", "n_agg", "bound", "n_init_adapter"))
    assert drawn(lab(3, **nothing)) == ["Does a rank index mean the same to every client?"]


def test_without_any_pair_there_is_no_section_of_cosines(lab: Callable[..., Path]) -> None:
    assert len(drawn(lab(3, cos_same=None, cos_other=None))) == 2


def test_an_exact_zero_stands_below_every_number_and_is_called_0() -> None:
    rounds = [line(1), line(2)]
    with style.applied():
        (axes,) = losses(rounds, style.WIDE).axes
    at = {text.get_text().split()[0]: text for text in axes.texts}
    start = next(each for each in axes.lines if each.get_color() == style.COLOURS["ours"])
    others = [
        value
        for each in axes.lines
        if each.get_marker() in ("s", "^")
        for value in np.asarray(each.get_ydata(), float)
    ]
    zero = float(np.asarray(start.get_ydata(), float)[0])
    assert zero < min(others)
    assert zero > axes.get_ylim()[0]
    assert at["start"].get_text() == "start 0"
    assert axes.yaxis.get_major_formatter()(zero, 0) == "0"
    assert axes.yaxis.get_major_formatter()(0.02, 0) == "0.02"


def test_places_are_the_sites_by_round() -> None:
    rounds = [line(round) for round in (1, 2, 3)]
    rounds[1]["sites"][SITES[4]]["n_agg"] = 7.0
    with style.applied():
        axes = places(rounds, style.WIDE).axes[0]
    values = np.asarray(axes.collections[0].get_array()).reshape(len(SITES), 3)
    assert values[4, 1] == 7.0
    assert values.max() == 7.0
    assert [label.get_text() for label in axes.get_yticklabels()][4] == "layer 2 query"


def test_a_round_without_a_pair_is_bridged() -> None:
    rounds = [line(1), line(2, cos_same=None), line(3)]
    with style.applied():
        (axes,) = cosines(rounds, None, style.WIDE).axes
    same = next(each for each in axes.lines if each.get_color() == style.COLOURS["ours"])
    assert list(np.asarray(same.get_xdata())) == [1, 3]


def test_the_matrix_is_the_mean_over_the_later_rounds_that_have_the_pair() -> None:
    rounds: list[dict[str, Any]] = [
        {"round": 1, "matrix": [[9.0, 9.0], [9.0, 9.0]]},
        {"round": 2, "matrix": [[0.2, None], [None, 0.4]]},
        {"round": 3, "matrix": [[0.4, None], [0.1, None]]},
    ]
    found = mean_matrix(rounds)
    assert found is not None
    assert found[0] == pytest.approx([0.3, math.nan], nan_ok=True)
    assert found[1] == pytest.approx([0.1, 0.4])
    assert mean_matrix([{"round": 1, "matrix": [[None]]}]) is None
    assert mean_matrix([]) is None


def test_sites_have_short_names() -> None:
    assert site_name("encoder.layer.3.attention.self.query") == "3 query"
    assert site_name("model.layers.11.self_attn.v_proj") == "11 v_proj"
    assert site_name("pooler.dense") == "dense"
