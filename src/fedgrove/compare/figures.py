"""The figures of a comparison. Each takes a width in inches; methods differ in colour, dash and
marker alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedgrove.compare.spread import Floats, clients_are_many, values_of
from fedgrove.ground import words
from fedgrove.report import style
from fedgrove.report.style import COLOURS, CYCLE

_MARKERS = "osD^vPX*"
_DASHES: Any = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (7, 1.5, 1.5, 1.5)))

Content = Mapping[str, Any]


def over_rounds(content: Content, width: float) -> Figure:
    """The mean client after each round; the band is from the lowest seed to the highest."""
    figure, axes = style.new_figure(width, style.fitting(width, 4.6, 4.4))
    for index, row in enumerate(content["methods"]):
        rounds = [point["round"] for point in row["curve"]]
        _line(
            axes,
            row,
            index,
            rounds,
            band=len(content["seeds"]) > 1,
            faint=len(content["methods"]) > 4,
        )
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=style.fitting(width, 10, 6)))
    return _finish(figure, axes, content, width)


def over_bytes(content: Content, width: float) -> Figure:
    """The same against what all clients together have sent and received; who sends nothing is a
    level line.
    """
    figure, axes = style.new_figure(width, style.fitting(width, 4.6, 4.4))
    for index, row in enumerate(content["methods"]):
        sent = [point["bytes"] for point in row["curve"]]
        if max(sent, default=0):
            _line(axes, row, index, sent, band=False, faint=False)
        else:
            axes.axhline(
                row["curve"][-1]["mean"], label=row["label"], **_look(row, index) | {"marker": ""}
            )
    axes.set_xlabel("sent and received by all clients")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: words.size(value) if value >= 0 else "")
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=style.fitting(width, 7, 4), steps=[1, 2, 5, 10]))
    return _finish(figure, axes, content, width)


def clients(content: Content, width: float) -> Figure:
    """The clients of all seeds: as they are (above) and after fine-tuning (below).

    A dot each, filled and hollow; of very many a thin line from the worst to the best, a thicker
    one from the 10th percentile to the 90th, a bar for the middle half.
    """
    rows = content["methods"]
    figure, axes = style.new_figure(width, 0.9 + 0.62 * len(rows))
    if clients_are_many(content):
        draw = _quantiles
    else:
        draw = _dots
    for place, row in enumerate(rows):
        for measure, offset in (("metric", -0.19), ("metric_tuned", 0.19)):
            values = values_of(row, measure)
            if len(values):
                draw(axes, place + offset, values, tuned=measure == "metric_tuned")
                _levels(axes, place + offset, row[measure])
    longest = style.fitting(width, 30, 14)
    axes.set_yticks(range(len(rows)), [words.shorten(row["label"], longest) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlabel(f"{content['metric']} of a client")
    _value_axis(axes.xaxis, content)
    axes.grid(axis="x")
    return figure


def _dots(axes: Axes, place: float, values: Floats, *, tuned: bool) -> None:
    colour = COLOURS["tuned" if tuned else "ours"]
    marks: Any = {"facecolors": colour, "alpha": 0.55, "marker": "o"}
    if tuned:
        marks = {"facecolors": "none", "marker": "D"}
    heights = place + _swarm(values)
    axes.scatter(values, heights, s=20, edgecolors=colour, linewidths=0.9, **marks)


def _quantiles(axes: Axes, place: float, values: Floats, *, tuned: bool) -> None:
    colour = COLOURS["tuned" if tuned else "ours"]
    worst, tail, low, high, top, best = np.percentile(values, [0, 10, 25, 75, 90, 100])
    axes.plot([worst, best], [place] * 2, color=colour, linewidth=1.0)
    axes.plot([tail, top], [place] * 2, color=colour, linewidth=3.6, solid_capstyle="butt")
    middle: Any = {"facecolor": COLOURS["paper"] if tuned else colour, "edgecolor": colour}
    axes.broken_barh([(low, high - low)], (place - 0.11, 0.22), linewidth=1.6, zorder=2, **middle)


def _levels(axes: Axes, place: float, statistics: Content) -> None:
    """Bars for the mean and the tail."""
    for statistic, role in (("mean", "ink"), ("tail10", "tail")):
        level = statistics[statistic]
        ends = [place - 0.17, place + 0.17]
        axes.plot([level] * 2, ends, color=COLOURS[role], linewidth=2.4, zorder=3)


def differences(content: Content, width: float) -> Figure:
    """Each method less the best one, mean over pairs with its 95 % interval; the methods that are
    not the best.
    """
    found = content["tests"]["metric"]["against_best"]
    figure, axes = style.new_figure(width, 0.9 + 0.34 * max(2, len(found)))
    if content["percent"]:
        factor = 100
    else:
        factor = 1
    for place, test in enumerate(found.values()):
        surely = test["p_holm"] < 0.05
        axes.plot(
            [factor * test["low"], factor * test["high"]],
            [place] * 2,
            color=COLOURS["ours"],
            linewidth=2.4,
        )
        if surely:
            fill = COLOURS["ours"]
        else:
            fill = COLOURS["paper"]
        axes.scatter(
            [factor * test["difference"]],
            [place],
            s=46,
            color=fill,
            edgecolors=COLOURS["ours"],
            linewidths=2,
            zorder=3,
        )
    axes.axvline(0, color=COLOURS["muted"], linewidth=1.2)
    longest = style.fitting(width, 30, 14)
    axes.set_yticks(range(len(found)), [words.shorten(label, longest) for label in found])
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(
        f"difference from the best, in {'points' if content['percent'] else content['metric']}"
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.typographic(f"{value:g}")))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=style.fitting(width, 8, 5), steps=[1, 2, 5, 10]))
    axes.grid(axis="x")
    return figure


def _line(
    axes: Axes, row: Content, index: int, places: list[float], *, band: bool, faint: bool
) -> None:
    curve, look = row["curve"], _look(row, index)
    if band:
        low, high = [point["low"] for point in curve], [point["high"] for point in curve]
        axes.fill_between(
            places, low, high, color=look["color"], alpha=0.05 if faint else 0.12, linewidth=0
        )
    if len(places) == 1 and not look["marker"]:
        look |= {"marker": "D", "markersize": 5}
    if len(places) > 30:
        look["markevery"] = len(places) // 12
    axes.plot(places, [point["mean"] for point in curve], label=row["label"], **look)


def _look(row: Content, index: int) -> dict[str, Any]:
    """Training alone looks as it does in a run's report; the others take the next colour, dash and
    marker.
    """
    if index == 0:  # the reference of the comparison
        return {"color": COLOURS["local"], "linestyle": (0, (2, 2)), "marker": "", "linewidth": 1.8}
    number = index - 1
    return {
        "color": CYCLE[number % len(CYCLE)],
        "linestyle": _DASHES[(number // len(CYCLE) + number) % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 2,
    }


def _finish(figure: Figure, axes: Axes, content: Content, width: float) -> Figure:
    base = content["base"]["metric"]["mean"]
    if base is not None:
        axes.axhline(
            base, color=COLOURS["base"], linewidth=1.4, linestyle=(0, (1, 1.5)), label="base"
        )
    axes.set_ylabel(f"{content['metric']}, mean client")
    axes.margins(x=0.02)
    _value_axis(axes.yaxis, content)
    axes.grid(axis="y")
    columns = max(1, int(width // 2.4))
    legend = figure.legend(
        loc="outside upper left", ncols=columns, frameon=False, handlelength=3, fontsize=10.5
    )
    for text in legend.get_texts():
        text.set_text(words.shorten(text.get_text(), 30))
    return figure


def _value_axis(axis: Any, content: Content) -> None:
    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    if content["percent"]:
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: words.typographic(f"{100 * value:g} %"))
        )


def _swarm(values: Floats) -> Floats:
    """Small vertical shifts, so that equal values lie beside each other: ``[n]`` in ±0.13."""
    shifts = np.zeros(len(values))
    span = float(values.max() - values.min()) or 1.0
    bins = np.round((values - values.min()) / span * 60).astype(int)
    for each in np.unique(bins):
        members = np.flatnonzero(bins == each)
        step = min(0.06, 0.26 / max(1, len(members) - 1))
        shifts[members] = (np.arange(len(members)) - (len(members) - 1) / 2) * step
    return shifts
