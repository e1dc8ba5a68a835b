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
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fedgrove.ground import words
from fedgrove.ground.plain import Plain
from fedgrove.ground.statistics import mean, percentiles, tail10
from fedgrove.report import style
from fedgrove.report.compare import Comparison
from fedgrove.report.data import Run
from fedgrove.report.style import COLOURS

MANY = 40  # above this, clients have no line of their own: they stand side by side without names
SHARED, BARS = 300, 100  # above the first, that many bars share the clients
_STEPS = [1, 2, 5, 10]  # ticks at round numbers
_ROW = 0.27  # inches a client's line is high

Floats = NDArray[np.float64]
Look = Plain  # keywords of a drawing


def accuracy(run: Run, comparison: Comparison, width: float) -> Figure:
    """Mean, tail and the spread of clients over rounds; the base and training alone as level
    lines.
    """
    figure, axes = style.new_figure(width, 4.2)
    rounds = list(run.history)
    scores = [list(each.values()) for each in run.history.values()]
    quantiles = [percentiles(each, [0, 25, 75, 100]) for each in scores]
    low, quarter, three, high = zip(*quantiles, strict=True)
    _band(axes, rounds, low, high, 0.10)
    _band(axes, rounds, quarter, three, 0.18)
    named = _curves(axes, run, rounds, scores)
    named += _levels(axes, comparison)
    axes.margins(x=0.015)
    ends = [end.value for end in named]
    bottom = min(*low, *ends)
    top = max(*high, *ends)
    margin = 0.06 * (top - bottom) or 0.05 * (abs(top) or 1)
    axes.set_ylim(bottom - margin, top + margin)
    height = top - bottom + 2 * margin
    _end_labels(
        axes,
        named,
        run.percent,
        height * 0.062,
    )
    _rounds_axis(axes, width)
    axes.set_ylabel(f"{run.metric} of a client")
    _value_axis(axes.yaxis, run.percent)
    return figure


def losses(run: Run, comparison: Comparison, width: float) -> Figure:
    """The mean training loss of each round with the range of its clients."""
    return _mean_and_range(run.losses, "training loss", width)


def preferences(run: Run, comparison: Comparison, width: float) -> Figure:
    """By how much clients' models prefer what is preferred, over rounds."""
    return _mean_and_range(run.over_rounds("margin"), "margin of a pair", width)


def chosen(run: Run, comparison: Comparison, width: float) -> Figure:
    """How much likelier than at the base a preferred answer is, over rounds."""
    return _mean_and_range(
        run.over_rounds("chosen_log_ratio"), "log π/π_ref of the preferred", width
    )


def _mean_and_range(by_round: Mapping[int, Sequence[float]], label: str, width: float) -> Figure:
    """The mean of each round's values and their range."""
    figure, axes = style.new_figure(width, 2.9)
    rounds = list(by_round)
    values = list(by_round.values())
    low = [min(each) for each in values]
    high = [max(each) for each in values]
    _band(axes, rounds, low, high, 0.12)
    means = [mean(each) for each in values]
    axes.plot(
        rounds,
        means,
        color=COLOURS["ours"],
        **_dots(rounds),
    )
    _rounds_axis(axes, width)
    axes.set_ylabel(label)
    return figure


@dataclass(frozen=True)
class End:
    """A line's name, its last value, and the role whose colour it has."""

    name: str
    value: float
    role: str


def _band(
    axes: Axes,
    rounds: Sequence[int],
    low: Sequence[float],
    high: Sequence[float],
    alpha: float,
) -> None:
    axes.fill_between(
        rounds,
        low,
        high,
        color=COLOURS["ours"],
        alpha=alpha,
        linewidth=0,
    )


def _curves(
    axes: Axes,
    run: Run,
    rounds: Sequence[int],
    scores: Sequence[Sequence[float]],
) -> list[End]:
    """The mean over rounds, and the tail of several clients."""
    dots = _dots(rounds)
    means = [mean(each) for each in scores]
    axes.plot(
        rounds,
        means,
        color=COLOURS["ours"],
        **dots,
    )
    ends = [End("mean", means[-1], "ours")]
    if len(run.clients) > 1:
        tails = [tail10(each) for each in scores]
        axes.plot(
            rounds,
            tails,
            color=COLOURS["tail"],
            linestyle=(0, (5, 1.5)),
            **dots,
        )
        ends.append(End("tail", tails[-1], "tail"))
    return ends


def _levels(axes: Axes, comparison: Comparison) -> list[End]:
    """The base and training alone, as far as they are known."""
    ends = []
    for name, row, role in (
        ("base", comparison.base, "base"),
        ("alone", comparison.local, "local"),
    ):
        if row is not None and row.values:
            axes.axhline(
                row.mean,
                color=COLOURS[role],
                linewidth=1.4,
                linestyle=(0, (2, 2)),
            )
            ends.append(End(name, row.mean, role))
    return ends


def clients(run: Run, comparison: Comparison, width: float) -> Figure:
    """Every client from base to this run (and on to local tuning), best first; the tail in its own
    colour.
    """
    crowd = Crowd.of(comparison.ours.values)
    figure, axes = style.new_figure(width, crowd.height(4.4))
    chart = Chart(axes, crowd, width)
    ours = crowd.gathered(comparison.ours.values)
    base = crowd.gathered(comparison.base.values)
    local: dict[int, float] = {}
    if comparison.local:
        local = crowd.gathered(comparison.local.values)
    tuned = crowd.gathered(run.values("metric_tuned"))
    everything: list[float] = []
    for each in (ours, base, local, tuned):
        everything.extend(each.values())
    floor = _floor(everything)
    top = max(everything)
    cut = tail10(comparison.ours.values.values())
    several = len(crowd) > 1
    roles = [_role(several and value <= cut) for value in ours.values()]
    chart.bars(
        list(ours.values()),
        roles,
        floor=floor,
        alpha=0.22,
    )
    size = min(34.0, max(5.0, 34 * MANY / len(crowd)))
    ring: Look = {
        "facecolors": COLOURS["paper"],
        "edgecolors": COLOURS["base"],
        "linewidths": 1.6,
    }
    dash: Look = {"color": COLOURS["local"], "linewidths": 2.2}
    diamond: Look = {
        "facecolors": "none",
        "edgecolors": COLOURS["tuned"],
        "linewidths": 1.8,
    }
    chart.marks(
        base,
        marker="o",
        s=size,
        **ring,
    )
    chart.marks(
        local,
        marker=chart.dash,
        s=size * 3,
        **dash,
    )
    chart.marks(
        ours,
        marker="o",
        s=size * 1.3,
        color=roles,
    )
    chart.marks(
        tuned,
        marker="D",
        s=size * 0.9,
        **diamond,
    )
    if several:
        chart.level(
            cut,
            color=COLOURS["tail"],
            linewidth=1.3,
            linestyle=(0, (5, 1.5)),
        )
    chart.names()
    _value_axis(chart.values, run.percent)
    room = 0.03 * (top - floor or 1)
    chart.limits(floor, top + room)
    chart.label(run.metric)
    return figure


def _role(loses: bool) -> str:
    """The colour of a client that fares badly, or of another."""
    if loses:
        return COLOURS["tail"]
    return COLOURS["ours"]


def gains(run: Run, comparison: Comparison, width: float) -> Figure:
    """What each client wins or loses against the reference, largest gain first."""
    found = comparison.gains()
    crowd = Crowd.of(found)
    figure, axes = style.new_figure(width, crowd.height(3.8))
    chart = Chart(axes, crowd, width)
    values = list(crowd.gathered(found).values())
    chart.bars(values, [_role(value < 0) for value in values])
    chart.level(0, color=COLOURS["muted"], linewidth=1)
    chart.names()
    if not crowd.upright:
        _numbers(
            axes,
            np.array(values),
            run.percent,
            width,
        )
    unit = 1
    what = run.metric
    if run.percent:
        unit = 100
        what = "points"
    chart.values.set_major_formatter(FuncFormatter(lambda value, _: _tick(unit * value)))
    ticks = MaxNLocator(nbins=style.fitting(width, 7, 5), steps=_STEPS)
    chart.values.set_major_locator(ticks)
    chart.label(f"gain in {what}")
    return figure


def _numbers(axes: Axes, values: Floats, percent: bool, width: float) -> None:
    """Each bar's value beyond its end, and room for it."""
    for place, value in enumerate(values):
        away = 4
        side = "left"
        if value < 0:
            away = -4
            side = "right"
        change = words.change(value, percent=percent)
        axes.annotate(
            words.typographic(change),
            (value, place),
            xytext=(away, 0),
            textcoords="offset points",
            ha=side,
            va="center_baseline",
            fontsize=9.5,
            color=COLOURS["muted"],
        )
    reach = max(float(np.abs(values).max()), 1e-9)
    low = min(float(values.min()), 0.0)
    high = max(float(values.max()), 0.0)
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
        members = []
        for share in np.array_split(np.arange(len(names)), BARS):
            own = [names[place] for place in share]
            members.append(tuple(own))
        return cls(tuple(members), len(names))

    def __len__(self) -> int:
        """How many bars there are."""
        return len(self.members)

    @property
    def upright(self) -> bool:
        return len(self) > MANY

    def height(self, upright: float) -> float:
        """Of the figure, in inches: ``upright``, or a line for each client."""
        if self.upright:
            return upright
        return 0.75 + _ROW * max(len(self), 2)

    def gathered(self, values: Mapping[str, float]) -> dict[int, float]:
        """``{place of the bar: mean of its members that have a value}``."""
        found = {}
        for at, names in enumerate(self.members):
            own = mean(values[name] for name in names if name in values)
            if not math.isnan(own):
                found[at] = own
        return found


@dataclass(frozen=True)
class Chart:
    """Bars of clients: they lie, with a name each, or stand side by side without."""

    axes: Axes
    crowd: Crowd
    width: float

    @property
    def values(self) -> Axis:
        """The axis along the bars."""
        if self.crowd.upright:
            return self.axes.yaxis
        return self.axes.xaxis

    @property
    def dash(self) -> str:
        """The mark that lies across a bar."""
        if self.crowd.upright:
            return "_"
        return "|"

    def bars(
        self,
        values: Sequence[float],
        colours: Sequence[str],
        *,
        floor: float = 0,
        alpha: float = 1,
    ) -> None:
        """From ``floor`` to each value."""
        places = np.arange(len(values))
        lengths = np.array(values) - floor
        look: Look = {
            "color": colours,
            "alpha": alpha,
            "linewidth": 0,
        }
        if self.crowd.upright:
            self.axes.bar(
                places,
                lengths,
                0.66,
                floor,
                **look,
            )
        else:
            self.axes.barh(
                places,
                lengths,
                0.66,
                floor,
                **look,
            )

    def marks(self, values: Mapping[int, float], **look: Any) -> None:
        """One mark for each bar that has a value."""
        places = list(values)
        numbers = list(values.values())
        if self.crowd.upright:
            self.axes.scatter(
                places,
                numbers,
                zorder=3,
                **look,
            )
        else:
            self.axes.scatter(
                numbers,
                places,
                zorder=3,
                **look,
            )

    def level(self, value: float, **look: Any) -> None:
        """A line across all bars."""
        if self.crowd.upright:
            self.axes.axhline(value, **look)
        else:
            self.axes.axvline(value, **look)

    def limits(self, low: float, high: float) -> None:
        if self.crowd.upright:
            self.axes.set_ylim(low, high)
        else:
            self.axes.set_xlim(low, high)

    def label(self, text: str) -> None:
        """What the values are, and lines to read them by."""
        self.values.set_label_text(text)
        if self.crowd.upright:
            self.axes.grid(axis="y")
        else:
            self.axes.grid(axis="x")

    def names(self) -> None:
        """Who the bars are: by name, or only how many."""
        if self.crowd.upright:
            self._count()
            return
        longest = style.fitting(self.width, 26, 15)
        names = [words.shorten(members[0], longest) for members in self.crowd.members]
        self.axes.set_yticks(range(len(names)), names)
        self.axes.set_ylim(len(names) - 0.4, -0.6)
        self.axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        self.axes.spines["left"].set_visible(False)

    def _count(self) -> None:
        self.axes.set_xlim(-1, len(self.crowd))
        self.axes.set_xticks([])
        text = f"{self.crowd.clients:,} clients, best first"
        shared = self.crowd.clients / len(self.crowd)
        if shared > 1:
            text += f"; a bar is the mean of {shared:,.0f}"
        self.axes.set_xlabel(text)


def _rounds_axis(axes: Axes, width: float) -> None:
    axes.set_xlabel("round")
    ticks = MaxNLocator(integer=True, nbins=style.fitting(width, 10, 6))
    axes.xaxis.set_major_locator(ticks)
    axes.grid(axis="y")


def _dots(rounds: Sequence[int]) -> Look:
    """Marks at the rounds, while there is room."""
    if len(rounds) > 30:
        return {}
    return {"marker": "o", "markersize": 5}


def _end_labels(
    axes: Axes,
    named: Sequence[End],
    percent: bool,
    gap: float,
) -> None:
    """Names and last values right of the lines, moved apart where they would overlap."""
    places = style.spread([end.value for end in named], gap)
    for end, place in zip(named, places, strict=True):
        weight = "normal"
        if end.role in ("ours", "tail"):
            weight = "bold"
        role = end.role
        if role == "base":
            role = "muted"
        score = words.score(end.value, percent=percent)
        axes.text(
            1.015,
            place,
            f"{end.name} {score}",
            transform=axes.get_yaxis_transform(),
            va="center_baseline",
            color=COLOURS[role],
            fontweight=weight,
        )


def _value_axis(axis: Axis, percent: bool) -> None:
    unit = 1
    sign = ""
    if percent:
        unit = 100
        sign = " %"
    written = FuncFormatter(lambda value, _: f"{round(unit * value, 6):g}{sign}")
    axis.set_major_formatter(written)
    axis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))


def _tick(value: float) -> str:
    rounded = round(value, 6)
    if rounded:
        return f"{rounded:+g}".replace("-", "−")
    return "0"


def _floor(values: Sequence[float]) -> float:
    """Where bars begin: zero, unless a metric goes below it."""
    lowest = min(values)
    if lowest >= 0:
        return 0.0
    return math.floor(lowest)
