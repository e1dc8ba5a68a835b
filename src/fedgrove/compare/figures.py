"""The figures of a comparison. Each takes a width in inches; methods differ in colour, dash and
marker alike.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedgrove.compare.spread import Floats, clients_are_many, values_of
from fedgrove.ground import words
from fedgrove.ground.plain import Given, Plain
from fedgrove.report import style
from fedgrove.report.style import COLOURS, CYCLE

_MARKERS = "osD^vPX*"
_DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1.5)),
    (0, (7, 1.5, 1.5, 1.5)),
)

Content = Given  # of compare.json
Look = Plain  # keywords of a drawing


def over_rounds(content: Content, width: float) -> Figure:
    """The mean client after each round; the band is from the lowest seed to the highest."""
    figure, axes = style.new_figure(width, style.fitting(width, 4.6, 4.4))
    alpha = 0.12
    if len(content["methods"]) > 4:
        alpha = 0.05
    for index, row in enumerate(content["methods"]):
        look = _look(row, index)
        rounds = [point["round"] for point in row["curve"]]
        if len(content["seeds"]) > 1:
            _band(axes, row, rounds, look["color"], alpha)
        _line(axes, row, rounds, look)
    axes.set_xlabel("round")
    ticks = MaxNLocator(integer=True, nbins=style.fitting(width, 10, 6))
    axes.xaxis.set_major_locator(ticks)
    return _finish(figure, axes, content, width)


def over_bytes(content: Content, width: float) -> Figure:
    """The same against what all clients together have sent and received; who sends nothing is a
    level line.
    """
    figure, axes = style.new_figure(width, style.fitting(width, 4.6, 4.4))
    for index, row in enumerate(content["methods"]):
        look = _look(row, index)
        sent = [point["bytes"] for point in row["curve"]]
        if max(sent, default=0):
            _line(axes, row, sent, look)
        else:
            last = row["curve"][-1]
            axes.axhline(
                last["mean"],
                label=row["label"],
                **look | {"marker": ""},
            )
    axes.set_xlabel("sent and received by all clients")
    axes.xaxis.set_major_formatter(FuncFormatter(_size))
    _round_ticks(axes.xaxis, style.fitting(width, 7, 4))
    return _finish(figure, axes, content, width)


def clients(content: Content, width: float) -> Figure:
    """The clients of all seeds: as they are (above) and after fine-tuning (below).

    A dot each, filled and hollow; of very many a thin line from the worst to the best, a thicker
    one from the 10th percentile to the 90th, a bar for the middle half.
    """
    rows = content["methods"]
    figure, axes = style.new_figure(width, 0.9 + 0.62 * len(rows))
    draw = _dots
    if clients_are_many(content):
        draw = _quantiles
    for place, row in enumerate(rows):
        for measure, offset in (("metric", -0.19), ("metric_tuned", 0.19)):
            height = place + offset
            values = values_of(row, measure)
            if len(values):
                draw(axes, height, values, tuned=measure == "metric_tuned")
                _levels(axes, height, row[measure])
    _name_rows(axes, [row["label"] for row in rows], width)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlabel(f"{content['metric']} of a client")
    _value_axis(axes.xaxis, content)
    axes.grid(axis="x")
    return figure


def _name_rows(axes: Axes, labels: list[str], width: float) -> None:
    """The labels at the rows of a figure, as long as there is room for."""
    longest = style.fitting(width, 30, 14)
    names = [words.shorten(label, longest) for label in labels]
    axes.set_yticks(range(len(names)), names)


def _size(value: float, place: int) -> str:
    if value < 0:
        return ""
    return words.size(value)


def _dots(axes: Axes, place: float, values: Floats, *, tuned: bool) -> None:
    if tuned:
        colour = COLOURS["tuned"]
        look: Look = {"facecolors": "none", "marker": "D"}
    else:
        colour = COLOURS["ours"]
        look = {
            "facecolors": colour,
            "alpha": 0.55,
            "marker": "o",
        }
    heights = place + _swarm(values)
    axes.scatter(
        values,
        heights,
        s=20,
        edgecolors=colour,
        linewidths=0.9,
        **look,
    )


def _quantiles(axes: Axes, place: float, values: Floats, *, tuned: bool) -> None:
    if tuned:
        colour = COLOURS["tuned"]
        fill = COLOURS["paper"]
    else:
        colour = COLOURS["ours"]
        fill = colour
    worst, tail, low, high, top, best = np.percentile(values, [0, 10, 25, 75, 90, 100])
    level = [place, place]
    axes.plot(
        [worst, best],
        level,
        color=colour,
        linewidth=1.0,
    )
    axes.plot(
        [tail, top],
        level,
        color=colour,
        linewidth=3.6,
        solid_capstyle="butt",
    )
    axes.broken_barh(
        [(low, high - low)],
        (place - 0.11, 0.22),
        linewidth=1.6,
        zorder=2,
        facecolor=fill,
        edgecolor=colour,
    )


def _levels(axes: Axes, place: float, statistics: Content) -> None:
    """Bars for the mean and the tail."""
    for statistic, role in (("mean", "ink"), ("tail10", "tail")):
        level = statistics[statistic]
        ends = [place - 0.17, place + 0.17]
        axes.plot(
            [level] * 2,
            ends,
            color=COLOURS[role],
            linewidth=2.4,
            zorder=3,
        )


def differences(content: Content, width: float) -> Figure:
    """Each method less the best one, mean over pairs with its 95 % interval; the methods that are
    not the best.
    """
    found = content["tests"]["metric"]["against_best"]
    figure, axes = style.new_figure(width, 0.9 + 0.34 * max(2, len(found)))
    if content["percent"]:
        factor = 100
        unit = "points"
    else:
        factor = 1
        unit = content["metric"]
    for place, test in enumerate(found.values()):
        _difference(axes, place, test, factor)
    axes.axvline(0, color=COLOURS["muted"], linewidth=1.2)
    _name_rows(axes, list(found), width)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel(f"difference from the best, in {unit}")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    _round_ticks(axes.xaxis, style.fitting(width, 8, 5))
    axes.grid(axis="x")
    return figure


def _difference(axes: Axes, place: float, test: Content, factor: float) -> None:
    """One method's mean difference with its interval; filled where it is surely one."""
    colour = COLOURS["ours"]
    fill = COLOURS["paper"]
    if test["p_holm"] < 0.05:
        fill = colour
    ends = [factor * test["low"], factor * test["high"]]
    axes.plot(
        ends,
        [place] * 2,
        color=colour,
        linewidth=2.4,
    )
    axes.scatter(
        [factor * test["difference"]],
        [place],
        s=46,
        color=fill,
        edgecolors=colour,
        linewidths=2,
        zorder=3,
    )


def _plain(value: float, place: int) -> str:
    return words.typographic(f"{value:g}")


def _band(
    axes: Axes,
    row: Content,
    places: list[float],
    colour: str,
    alpha: float,
) -> None:
    """From the lowest seed to the highest."""
    low = [point["low"] for point in row["curve"]]
    high = [point["high"] for point in row["curve"]]
    axes.fill_between(
        places,
        low,
        high,
        color=colour,
        alpha=alpha,
        linewidth=0,
    )


def _line(
    axes: Axes,
    row: Content,
    places: list[float],
    look: Look,
) -> None:
    if len(places) == 1 and not look["marker"]:
        look |= {"marker": "D", "markersize": 5}
    if len(places) > 30:
        look["markevery"] = len(places) // 12
    means = [point["mean"] for point in row["curve"]]
    axes.plot(
        places,
        means,
        label=row["label"],
        **look,
    )


def _look(row: Content, index: int) -> Look:
    """Training alone looks as it does in a run's report; the others take the next colour, dash and
    marker.
    """
    if index == 0:  # the reference of the comparison
        return {
            "color": COLOURS["local"],
            "linestyle": (0, (2, 2)),
            "marker": "",
            "linewidth": 1.8,
        }
    number = index - 1
    dash = number // len(CYCLE) + number
    return {
        "color": CYCLE[number % len(CYCLE)],
        "linestyle": _DASHES[dash % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 2,
    }


def _finish(figure: Figure, axes: Axes, content: Content, width: float) -> Figure:
    base = content["base"]["metric"]["mean"]
    if base is not None:
        axes.axhline(
            base,
            color=COLOURS["base"],
            linewidth=1.4,
            linestyle=(0, (1, 1.5)),
            label="base",
        )
    axes.set_ylabel(f"{content['metric']}, mean client")
    axes.margins(x=0.02)
    _value_axis(axes.yaxis, content)
    axes.grid(axis="y")
    columns = max(1, int(width // 2.4))
    legend = figure.legend(
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        handlelength=3,
        fontsize=10.5,
    )
    for text in legend.get_texts():
        label = words.shorten(text.get_text(), 30)
        text.set_text(label)
    return figure


def _value_axis(axis: Axis, content: Content) -> None:
    _round_ticks(axis, 6)
    if content["percent"]:
        axis.set_major_formatter(FuncFormatter(_percent))


def _percent(value: float, place: int) -> str:
    return words.typographic(f"{100 * value:g} %")


def _round_ticks(axis: Axis, most: int) -> None:
    """Ticks at round numbers, so many at most."""
    axis.set_major_locator(MaxNLocator(nbins=most, steps=[1, 2, 5, 10]))


def _swarm(values: Floats) -> Floats:
    """Small vertical shifts, so that equal values lie beside each other: ``[n]`` in ±0.13."""
    shifts = np.zeros(len(values))
    lowest = values.min()
    span = float(values.max() - lowest) or 1.0
    bins = np.round((values - lowest) / span * 60).astype(int)
    for each in np.unique(bins):
        members = np.flatnonzero(bins == each)
        gaps = len(members) - 1
        step = min(0.06, 0.26 / max(1, gaps))
        centred = np.arange(len(members)) - gaps / 2
        shifts[members] = centred * step
    return shifts
