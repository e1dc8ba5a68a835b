"""The figures that every run has. Each takes a width in inches and is drawn twice, for a page and
for a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedgrove.ground import words
from fedgrove.ground.statistics import mean, tail10
from fedgrove.report import style
from fedgrove.report.compare import Comparison
from fedgrove.report.data import Run
from fedgrove.report.style import COLOURS

MANY = 40  # above this, clients have no line of their own: they stand side by side without names
_STEPS = [1, 2, 5, 10]  # ticks at round numbers
_ROW = 0.27  # inches a client's line is high


def accuracy(run: Run, comparison: Comparison, width: float) -> Figure:
    """Mean, tail and the spread of clients over rounds; the base and training alone as level
    lines.
    """
    figure, axes = style.new_figure(width, 4.2)
    rounds = list(run.history)
    scores = [sorted(each.values()) for each in run.history.values()]
    means, tails = [mean(each) for each in scores], [tail10(each) for each in scores]
    low, high = [each[0] for each in scores], [each[-1] for each in scores]
    quarter, three = ([float(np.percentile(each, q)) for each in scores] for q in (25, 75))
    axes.fill_between(rounds, low, high, color=COLOURS["ours"], alpha=0.10, linewidth=0)
    axes.fill_between(rounds, quarter, three, color=COLOURS["ours"], alpha=0.18, linewidth=0)
    dots: Any = {"marker": "o", "markersize": 5} if len(rounds) <= 30 else {}
    axes.plot(rounds, means, color=COLOURS["ours"], **dots)
    named = [("mean", means[-1], "ours")]
    if len(run.clients) > 1:
        axes.plot(rounds, tails, color=COLOURS["tail"], linestyle=(0, (5, 1.5)), **dots)
        named.append(("tail", tails[-1], "tail"))
    for row, role in ((comparison.base, "base"), (comparison.local, "local")):
        if row is not None and row.values:
            axes.axhline(row.mean, color=COLOURS[role], linewidth=1.4, linestyle=(0, (2, 2)))
            named.append(("base" if role == "base" else "alone", row.mean, role))
    axes.margins(x=0.015)
    bottom, top = (
        min(*low, *(value for _, value, _ in named)),
        max(*high, *(value for _, value, _ in named)),
    )
    margin = 0.06 * (top - bottom) or 0.05 * (abs(top) or 1)
    axes.set_ylim(bottom - margin, top + margin)
    _end_labels(axes, named, run.percent, (top - bottom + 2 * margin) * 0.062)
    axes.set_xlabel("round")
    axes.set_ylabel(f"{run.metric} of a client")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10 if width > style.NARROW else 6))
    _value_axis(axes.yaxis, run.percent)
    axes.grid(axis="y")
    return figure


def losses(run: Run, width: float) -> Figure:
    """The mean training loss of each round with the range of its clients."""
    figure, axes = style.new_figure(width, 2.9)
    rounds, values = list(run.losses), list(run.losses.values())
    axes.fill_between(
        rounds,
        [min(each) for each in values],
        [max(each) for each in values],
        color=COLOURS["ours"],
        alpha=0.12,
        linewidth=0,
    )
    dots: Any = {"marker": "o", "markersize": 5} if len(rounds) <= 30 else {}
    axes.plot(rounds, [mean(each) for each in values], color=COLOURS["ours"], **dots)
    axes.set_xlabel("round")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10 if width > style.NARROW else 6))
    axes.grid(axis="y")
    return figure


def clients(run: Run, comparison: Comparison, width: float) -> Figure:
    """Every client from base to this run (and on to local tuning), best first; the tail in its own
    colour.
    """
    ours = comparison.ours.values
    names = sorted(ours, key=lambda name: (-ours[name], name))
    cut = tail10(ours.values())
    upright = len(names) > MANY
    figure, axes = style.new_figure(width, 4.4 if upright else 0.75 + _ROW * max(len(names), 2))
    places = np.arange(len(names))
    values = np.array([ours[name] for name in names])
    roles = [
        COLOURS["tail"] if len(names) > 1 and ours[name] <= cut else COLOURS["ours"]
        for name in names
    ]
    tuned = run.values("metric_tuned")
    everything = [
        *values,
        *comparison.base.values.values(),
        *tuned.values(),
        *(comparison.local.values.values() if comparison.local else []),
    ]
    floor = _floor(everything)
    bar = axes.bar if upright else axes.barh
    bar(places, values - floor, 0.66, floor, color=roles, alpha=0.22, linewidth=0)
    size = 34 if not upright else max(5.0, 34 * MANY / len(names))
    _marks(
        axes,
        upright,
        names,
        comparison.base.values,
        marker="o",
        s=size,
        facecolors=COLOURS["paper"],
        edgecolors=COLOURS["base"],
        linewidths=1.6,
    )
    if comparison.local:
        _marks(
            axes,
            upright,
            names,
            comparison.local.values,
            marker="_" if upright else "|",
            s=size * 3,
            color=COLOURS["local"],
            linewidths=2.2,
        )
    _marks(axes, upright, names, ours, marker="o", s=size * 1.3, color=roles)
    _marks(
        axes,
        upright,
        names,
        tuned,
        marker="D",
        s=size * 0.9,
        facecolors="none",
        edgecolors=COLOURS["tuned"],
        linewidths=1.8,
    )
    if len(names) > 1:
        line = axes.axhline if upright else axes.axvline
        line(cut, color=COLOURS["tail"], linewidth=1.3, linestyle=(0, (5, 1.5)))
    _places(axes, upright, names, width)
    axis = axes.yaxis if upright else axes.xaxis
    _value_axis(axis, run.percent)
    (axes.set_ylim if upright else axes.set_xlim)(
        floor, max(everything) + 0.03 * (max(everything) - floor or 1)
    )
    (axes.set_ylabel if upright else axes.set_xlabel)(run.metric)
    axes.grid(axis="y" if upright else "x")
    return figure


def gains(run: Run, comparison: Comparison, width: float) -> Figure:
    """What each client wins or loses against the reference, largest gain first."""
    found = comparison.gains()
    names, values = list(found), np.array(list(found.values()))
    upright = len(names) > MANY
    figure, axes = style.new_figure(width, 3.8 if upright else 0.75 + _ROW * max(len(names), 2))
    colours = [COLOURS["ours"] if value >= 0 else COLOURS["tail"] for value in values]
    bar = axes.bar if upright else axes.barh
    bar(np.arange(len(names)), values, 0.66, color=colours, linewidth=0)
    (axes.axhline if upright else axes.axvline)(0, color=COLOURS["muted"], linewidth=1)
    _places(axes, upright, names, width)
    reach = max(float(np.abs(values).max()), 1e-9)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    if not upright:
        for place, value in enumerate(values):
            axes.annotate(
                words.typographic(words.change(value, percent=run.percent)),
                (value, place),
                xytext=(4 if value >= 0 else -4, 0),
                textcoords="offset points",
                ha="left" if value >= 0 else "right",
                va="center_baseline",
                fontsize=9.5,
                color=COLOURS["muted"],
            )
        room = 0.11 * (high - low or reach) * style.WIDE / width  # for the numbers beyond the bars
        low, high = (
            low - (room if (values < 0).any() else 0),
            high + (room if (values >= 0).any() else 0),
        )
        axes.set_xlim(low, high)
    axis = axes.yaxis if upright else axes.xaxis
    unit = 100 if run.percent else 1
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(unit * value)))
    axis.set_major_locator(MaxNLocator(nbins=7 if width > style.NARROW else 5, steps=_STEPS))
    label = "points" if run.percent else run.metric
    (axes.set_ylabel if upright else axes.set_xlabel)(f"gain in {label}")
    axes.grid(axis="y" if upright else "x")
    return figure


def _marks(
    axes: Axes, upright: bool, names: Sequence[str], values: Mapping[str, float], **look: object
) -> None:
    """One mark for each client that has a value, at the client's place."""
    there = [place for place, name in enumerate(names) if name in values]
    numbers = [values[names[place]] for place in there]
    colour = look.get("color")
    if isinstance(colour, list):
        look = {**look, "color": [colour[place] for place in there]}
    axes.scatter(*((there, numbers) if upright else (numbers, there)), zorder=3, **look)  # type: ignore[arg-type]


def _places(axes: Axes, upright: bool, names: Sequence[str], width: float) -> None:
    """The clients' axis: names from top to bottom where there is a line for each, else only how
    many they are.
    """
    if upright:
        axes.set_xlim(-1, len(names))
        axes.set_xticks([])
        axes.set_xlabel(f"{len(names)} clients, best first")
    else:
        longest = 26 if width > style.NARROW else 15
        axes.set_yticks(range(len(names)), [words.shorten(name, longest) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.spines["left"].set_visible(False)


def _end_labels(
    axes: Axes, named: Sequence[tuple[str, float, str]], percent: bool, gap: float
) -> None:
    """Names and last values right of the lines, moved apart where they would overlap."""
    for (name, value, role), place in zip(
        named, style.spread([value for _, value, _ in named], gap), strict=True
    ):
        axes.text(
            1.015,
            place,
            f"{name} {words.score(value, percent=percent)}",
            transform=axes.get_yaxis_transform(),
            va="center_baseline",
            color=COLOURS["muted" if role == "base" else role],
            fontweight="bold" if role in ("ours", "tail") else "normal",
        )


def _value_axis(axis: object, percent: bool) -> None:
    formatter = FuncFormatter(
        lambda value, _: f"{round(100 * value, 6):g} %" if percent else f"{value:g}"
    )
    axis.set_major_formatter(formatter)  # type: ignore[attr-defined]
    axis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))  # type: ignore[attr-defined]


def _tick(value: float) -> str:
    rounded = round(value, 6)
    return f"{rounded:+g}".replace("-", "−") if rounded else "0"


def _floor(values: Sequence[float]) -> float:
    """Where bars begin: zero, unless a metric goes below it."""
    lowest = min(values)
    return 0.0 if lowest >= 0 else math.floor(lowest)
