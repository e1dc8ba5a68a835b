"""The figures that every run has. Each takes a width in inches and is drawn twice, for a page and
for a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fedgrove.ground import words
from fedgrove.ground.statistics import mean, tail10
from fedgrove.report import style
from fedgrove.report.compare import Comparison
from fedgrove.report.data import Run
from fedgrove.report.style import COLOURS

MANY = 40  # above this, clients have no line of their own: they stand side by side without names
SHARED, BARS = 300, 100  # above the first, that many bars share the clients
_STEPS = [1, 2, 5, 10]  # ticks at round numbers
_ROW = 0.27  # inches a client's line is high

Floats = NDArray[np.float64]


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
    dots = _dots(rounds)
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


def losses(run: Run, comparison: Comparison, width: float) -> Figure:
    """The mean training loss of each round with the range of its clients."""
    figure, axes = style.new_figure(width, 2.9)
    rounds, values = list(run.losses), list(run.losses.values())
    low, high = [min(each) for each in values], [max(each) for each in values]
    axes.fill_between(rounds, low, high, color=COLOURS["ours"], alpha=0.12, linewidth=0)
    means = [mean(each) for each in values]
    axes.plot(rounds, means, color=COLOURS["ours"], **_dots(rounds))
    axes.set_xlabel("round")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10 if width > style.NARROW else 6))
    axes.grid(axis="y")
    return figure


def clients(run: Run, comparison: Comparison, width: float) -> Figure:
    """Every client from base to this run (and on to local tuning), best first; the tail in its own
    colour.
    """
    crowd = Crowd.of(comparison.ours.values)
    ours = crowd.gathered(comparison.ours.values)
    base = crowd.gathered(comparison.base.values)
    local = crowd.gathered(comparison.local.values) if comparison.local else {}
    tuned = crowd.gathered(run.values("metric_tuned"))
    cut = tail10(comparison.ours.values.values())
    one = len(crowd) == 1
    roles = [COLOURS["tail" if ours[at] <= cut and not one else "ours"] for at in ours]
    figure, axes = style.new_figure(width, crowd.height(4.4))
    everything = [value for each in (ours, base, local, tuned) for value in each.values()]
    floor = _floor(everything)
    values = np.array(list(ours.values()))
    bar = axes.bar if crowd.upright else axes.barh
    bar(np.arange(len(crowd)), values - floor, 0.66, floor, color=roles, alpha=0.22, linewidth=0)
    size = max(5.0, 34 * MANY / len(crowd)) if crowd.upright else 34
    ring: Any = {"facecolors": COLOURS["paper"], "edgecolors": COLOURS["base"], "linewidths": 1.6}
    dash: Any = {"color": COLOURS["local"], "linewidths": 2.2}
    diamond: Any = {"facecolors": "none", "edgecolors": COLOURS["tuned"], "linewidths": 1.8}
    _marks(axes, crowd, base, marker="o", s=size, **ring)
    _marks(axes, crowd, local, marker="_" if crowd.upright else "|", s=size * 3, **dash)
    _marks(axes, crowd, ours, marker="o", s=size * 1.3, color=roles)
    _marks(axes, crowd, tuned, marker="D", s=size * 0.9, **diamond)
    if not one:
        line = axes.axhline if crowd.upright else axes.axvline
        line(cut, color=COLOURS["tail"], linewidth=1.3, linestyle=(0, (5, 1.5)))
    _places(axes, crowd, width)
    axis = axes.yaxis if crowd.upright else axes.xaxis
    _value_axis(axis, run.percent)
    top = max(everything)
    limits = axes.set_ylim if crowd.upright else axes.set_xlim
    limits(floor, top + 0.03 * (top - floor or 1))
    (axes.set_ylabel if crowd.upright else axes.set_xlabel)(run.metric)
    axes.grid(axis="y" if crowd.upright else "x")
    return figure


def gains(run: Run, comparison: Comparison, width: float) -> Figure:
    """What each client wins or loses against the reference, largest gain first."""
    found = comparison.gains()
    crowd = Crowd.of(found)
    values = np.array(list(crowd.gathered(found).values()))
    figure, axes = style.new_figure(width, crowd.height(3.8))
    colours = [COLOURS["ours" if value >= 0 else "tail"] for value in values]
    bar = axes.bar if crowd.upright else axes.barh
    bar(np.arange(len(crowd)), values, 0.66, color=colours, linewidth=0)
    (axes.axhline if crowd.upright else axes.axvline)(0, color=COLOURS["muted"], linewidth=1)
    _places(axes, crowd, width)
    if not crowd.upright:
        _numbers(axes, values, run.percent, width)
    axis = axes.yaxis if crowd.upright else axes.xaxis
    unit = 100 if run.percent else 1
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(unit * value)))
    axis.set_major_locator(MaxNLocator(nbins=7 if width > style.NARROW else 5, steps=_STEPS))
    label = "points" if run.percent else run.metric
    (axes.set_ylabel if crowd.upright else axes.set_xlabel)(f"gain in {label}")
    axes.grid(axis="y" if crowd.upright else "x")
    return figure


def _numbers(axes: Axes, values: Floats, percent: bool, width: float) -> None:
    """Each bar's value beyond its end, and room for it."""
    for place, value in enumerate(values):
        right = value >= 0
        axes.annotate(
            words.typographic(words.change(value, percent=percent)),
            (value, place),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center_baseline",
            fontsize=9.5,
            color=COLOURS["muted"],
        )
    reach = max(float(np.abs(values).max()), 1e-9)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    room = 0.11 * (high - low or reach) * style.WIDE / width
    if (values < 0).any():
        low -= room
    if (values >= 0).any():
        high += room
    axes.set_xlim(low, high)


@dataclass(frozen=True)
class Crowd:
    """The clients of a figure, best first. Each has a line of its own, then a bar without a name;
    of very many, neighbours share a bar, which is their mean.
    """

    members: tuple[tuple[str, ...], ...]  # of each bar
    clients: int

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Crowd:
        names = sorted(values, key=lambda name: (-values[name], name))
        if len(names) <= SHARED:
            return cls(tuple((name,) for name in names), len(names))
        shares = np.array_split(np.arange(len(names)), BARS)
        members = tuple(tuple(names[place] for place in share) for share in shares)
        return cls(members, len(names))

    def __len__(self) -> int:
        """How many bars there are."""
        return len(self.members)

    @property
    def upright(self) -> bool:
        return len(self) > MANY

    def height(self, upright: float) -> float:
        """Of the figure, in inches: ``upright``, or a line for each client."""
        return upright if self.upright else 0.75 + _ROW * max(len(self), 2)

    def gathered(self, values: Mapping[str, float]) -> dict[int, float]:
        """``{place of the bar: mean of its members that have a value}``."""
        means = {
            at: mean(values[name] for name in names if name in values)
            for at, names in enumerate(self.members)
        }
        return {at: value for at, value in means.items() if not math.isnan(value)}


def _marks(axes: Axes, crowd: Crowd, values: Mapping[int, float], **look: Any) -> None:
    """One mark for each bar that has a value."""
    places, numbers = list(values), list(values.values())
    if crowd.upright:
        axes.scatter(places, numbers, zorder=3, **look)
    else:
        axes.scatter(numbers, places, zorder=3, **look)


def _places(axes: Axes, crowd: Crowd, width: float) -> None:
    """The clients' axis: names from top to bottom where there is a line for each, else only how
    many they are.
    """
    if crowd.upright:
        axes.set_xlim(-1, len(crowd))
        axes.set_xticks([])
        shared = crowd.clients / len(crowd)
        each = f"; a bar is the mean of {shared:,.0f}" if shared > 1 else ""
        axes.set_xlabel(f"{crowd.clients:,} clients, best first{each}")
        return
    longest = 26 if width > style.NARROW else 15
    names = [words.shorten(members[0], longest) for members in crowd.members]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.spines["left"].set_visible(False)


def _dots(rounds: Sequence[int]) -> dict[str, Any]:
    """Marks at the rounds, while there is room."""
    return {"marker": "o", "markersize": 5} if len(rounds) <= 30 else {}


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
