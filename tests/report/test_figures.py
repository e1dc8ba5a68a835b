from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from fedgrove.report import figures, style
from fedgrove.report.compare import compare
from fedgrove.report.data import load
from fedgrove.report.style import Figure

from .conftest import MakeRun


def texts(figure: Figure) -> list[str]:
    """Everything written in a figure, tick labels included."""
    figure.draw_without_rendering()
    return [
        each.get_text()
        for each in figure.findobj(Text)
        if isinstance(each, Text) and each.get_text()
    ]


@pytest.mark.parametrize("width", [style.WIDE, style.NARROW])
def test_the_ends_of_the_lines_are_the_numbers_of_the_table(
    make_run: MakeRun, width: float
) -> None:
    run, local = load(make_run("run")), load(make_run("local", method="local", gain=0.1))
    comparison = compare(run, [local])
    with style.applied():
        found = texts(figures.accuracy(run, comparison, width))
    assert comparison.local is not None
    for name, value in (
        ("mean", comparison.ours.mean),
        ("tail", comparison.ours.tail),
        ("base", comparison.base.mean),
        ("alone", comparison.local.mean),
    ):
        assert f"{name} {100 * value:.1f} %" in found


def test_clients_are_named_best_first_up_to_a_number(make_run: MakeRun) -> None:
    few, many = load(make_run("few", clients=5)), load(make_run("many", clients=figures.MANY + 1))
    with style.applied():
        figure = figures.clients(few, compare(few, []), style.WIDE)
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        crowd = texts(figures.clients(many, compare(many, []), style.WIDE))
    metric = few.values("metric")
    assert names == sorted(metric, key=lambda name: (-metric[name], name))
    assert f"{figures.MANY + 1} clients, best first" in crowd
    assert not any(text.startswith("client-") for text in crowd)


def test_bars_that_clients_share_are_their_means(make_run: MakeRun) -> None:
    values = {f"c{n}": n / 1000 for n in range(1000)}
    crowd = figures.Crowd.of(values)
    assert len(crowd) == figures.BARS
    assert sum(map(len, crowd.members)) == crowd.clients == 1000
    found = crowd.gathered(values)
    assert found[0] == pytest.approx(0.9945)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert crowd.gathered({"c999": 0.5}) == {0: 0.5}, "whoever has a value counts"


def test_bars_of_the_gains_are_the_differences(make_run: MakeRun) -> None:
    run, local = (
        load(make_run("run", clients=6)),
        load(make_run("local", method="local", clients=6)),
    )
    comparison = compare(run, [local])
    with style.applied():
        axes = figures.gains(run, comparison, style.WIDE).axes[0]
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    assert [bar.get_width() for bar in bars] == pytest.approx(list(comparison.gains().values()))
    for bar in bars:
        role = "ours" if bar.get_width() >= 0 else "tail"
        assert to_hex(bar.get_facecolor()) == style.COLOURS[role]


@pytest.mark.parametrize("draw", [figures.clients, figures.gains])
def test_ticks_are_round_and_a_zero_has_no_sign(
    make_run: MakeRun, draw: Callable[..., Figure]
) -> None:
    run = load(make_run("run", clients=6))
    with style.applied():
        figure = partial(draw, run, compare(run, []))(style.NARROW)
        figure.draw_without_rendering()
        labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    numbers = [float(label.replace("−", "-").replace(" %", "")) for label in labels]
    steps = {round(after - before, 6) for before, after in pairwise(numbers)}
    assert len(steps) == 1  # a rounded label would break the rhythm
    assert "+0" not in labels
