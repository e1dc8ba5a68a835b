"""The noise lab's ``noise.jsonl``: what rounds lose on the way down and in the mean, and what an
index means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from fedgrove.ground import words
from fedgrove.ground.lines import read
from fedgrove.ground.plain import Given, Plain
from fedgrove.report import style
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import COLOURS

_SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#b35900", "#f2c48d", "#f1f1ee", "#8fc1e3", "#00538a"]
)
_AMOUNT = LinearSegmentedColormap.from_list("amount", ["#f1f1ee", "#f2c48d", "#d98032", "#8a3c00"])
# an update has a norm of 0.01 and more: less than this is what float32 cannot hold
_ROUNDING = 1e-6
_MOST_CELLS = 24  # above so many rows a matrix has no thin gaps between its cells
_DASHES: Plain = {
    "solid": "-",
    "dashed": (0, (5, 1.5)),
    "dotted": (0, (1.2, 1.4)),
    "dashdot": (0, (6, 1.5, 1.2, 1.5)),
}

Rounds = Sequence[Given]  # the lines of noise.jsonl
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Curve:
    """One quantity over rounds. ``values`` has None where there is none."""

    name: str
    values: list[float | None]
    colour: str
    dash: str
    marker: str

    @property
    def last(self) -> float | None:
        if self.numbers:
            return self.numbers[-1]
        return None

    @property
    def numbers(self) -> list[float]:
        return [value for value in self.values if value is not None]


def noise(left: Left) -> list[Section]:
    """What was lost, where, and whether rank indices mean the same to all."""
    rounds = read(left.folder / "noise.jsonl")
    found = []
    means = _known(rounds, "n_agg")
    if means or _known(rounds, "n_init"):
        title = "What a round loses between the server and its clients"
        text = _losses_text(rounds)
        found.append(Section(title, text, partial(losses, rounds)))
    if len(rounds) > 1 and max(means, default=0.0) > _ROUNDING:
        title = "Where the mean loses"
        text = "Aggregation noise of each adapted layer, the shallowest at the top. Darker is more."
        found.append(Section(title, text, partial(places, rounds)))
    if _known(rounds, "cos_same") or _known(rounds, "cos_other"):
        matrix = mean_matrix(read(left.folder / "cosines.jsonl"))
        title = "Does a rank index mean the same to every client?"
        text = _cosine_text(rounds, matrix)
        found.append(Section(title, text, partial(cosines, rounds, matrix)))
    return found


def _known(rounds: Rounds, key: str) -> list[float]:
    """The numbers of one quantity, of the rounds that have one."""
    values = [line[key] for line in rounds]
    return [value for value in values if value is not None]


# ---------------------------------------------------------------------- figures
def losses(rounds: Rounds, width: float) -> Figure:
    """n_init, n_agg and the bound on a log axis; what is exactly zero stands on a line of its own
    below it.
    """
    figure, axes = style.new_figure(width, 4.0)
    curves = _loss_curves(rounds, width)
    numbers: list[float] = []
    for curve in curves:
        numbers.extend(curve.numbers)
    positive = [value for value in numbers if value] or [1.0]
    low = min(positive)
    high = max(positive)
    decades = max(0.6, math.log10(high / low))
    zero = low / 10 ** (0.28 * decades)  # where exact zeros stand
    has_zero = 0 in numbers
    axes.set_yscale("log")
    for curve in curves:
        _draw(axes, rounds, curve, zero)
    top = high * 10 ** (0.08 * decades)
    if has_zero:
        bottom = zero / 10 ** (0.09 * decades)
        axes.set_ylim(bottom, top)
        _log_ticks(axes, low, high, zero)
        line = low / 10 ** (0.16 * decades)
        axes.axhline(
            line,
            color=COLOURS["line"],
            linewidth=1.2,
            linestyle=(0, (3, 3)),
        )
    else:
        bottom = low / 10 ** (0.08 * decades)
        axes.set_ylim(bottom, top)
        _log_ticks(axes, low, high, None)
    _rounds_axis(axes, rounds, width)
    axes.set_ylabel("norm of what is lost")
    axes.grid(axis="y")
    gap = style.fitting(width, 0.066, 0.125) * math.log10(top / bottom)
    spots = style.spread([math.log10(curve.last or zero) for curve in curves], gap)
    for curve, spot in zip(curves, spots, strict=True):
        number = _number(curve.last or 0.0)
        text = style.fitting(
            width,
            f"{curve.name} {number}",
            f"{curve.name}\n{number}",
        )
        _label(
            axes,
            text,
            10**spot,
            curve.colour,
        )
    return figure


def _loss_curves(rounds: Rounds, width: float) -> list[Curve]:
    """The bound and the three losses, as far as they are known; the start by the adapter alone
    only where it says something else.
    """
    bound = _curve(rounds, "bound", "bound", "muted", "dotted", "^")
    mean = _curve(rounds, "n_agg", "aggregation", "tail", "dashed", "s")
    name = style.fitting(width, "start, adapter only", "adapter only")
    adapter = _curve(rounds, "n_init_adapter", name, "local", "dashdot", "D")
    start = _curve(rounds, "n_init", "start", "ours", "solid", "o")
    curves = [bound, mean, adapter, start]
    if adapter.values == start.values:  # nothing is merged into the base: one reading
        curves = [bound, mean, start]
    return [curve for curve in curves if curve.numbers]


def places(rounds: Rounds, width: float) -> Figure:
    """n_agg of every site over the rounds."""
    sites = list(rounds[0]["sites"])
    values = np.array([[line["sites"][site]["n_agg"] or 0.0 for line in rounds] for site in sites])
    row = float(np.clip(6.0 / len(sites), 0.09, 0.27))
    tall = row * len(sites)
    figure, axes = style.new_figure(width, 0.9 + tall)
    starts = [line["round"] - 0.5 for line in rounds]
    end = rounds[-1]["round"] + 0.5
    image = _cells(
        axes,
        np.array([*starts, end]),
        np.arange(len(sites) + 1) - 0.5,
        values,
        _AMOUNT,
        (0.0, float(values.max())),
    )
    step = math.ceil(0.2 / row)
    before = style.fitting(width, "layer ", "")
    names = [before + site_name(site) for site in sites[::step]]
    axes.set_yticks(range(0, len(sites), step), names)
    axes.set_ylim(len(sites) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("round")
    ticks = MaxNLocator(integer=True, nbins=style.fitting(width, 10, 6))
    axes.xaxis.set_major_locator(ticks)
    bar = figure.colorbar(
        image,
        ax=axes,
        fraction=style.fitting(width, 0.03, 0.06),
        pad=0.015,
        aspect=tall / 0.13,
    )
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=4)
    bar.update_ticks()
    return figure


def cosines(rounds: Rounds, matrix: Floats | None, width: float) -> Figure:
    """Mean cosine of modules of the same and of another index over rounds, and index by index."""
    if matrix is None:
        figure, axes = style.new_figure(width, 3.4)
        _rounds_axis(axes, rounds, width)
    else:
        height = style.fitting(width, 4.0, 7.6)
        figure = Figure(figsize=(width, height), layout="constrained")
        beside: Plain = {"ncols": 2, "width_ratios": (1.3, 1)}
        below: Plain = {"nrows": 2, "height_ratios": (1, 1.2)}
        first, second = figure.subfigures(**style.fitting(width, beside, below))
        axes = first.add_subplot()
        _matrix(second, second.add_subplot(), matrix)
        _rounds_axis(axes, rounds, style.fitting(width, width / 2, width))
    same = _curve(rounds, "cos_same", "same index", "ours", "solid", "o")
    other = _curve(rounds, "cos_other", "other index", "tail", "dashed", "s")
    curves = [curve for curve in (same, other) if curve.numbers]
    axes.axhline(0, color=COLOURS["muted"], linewidth=1)
    for curve in curves:
        _draw(axes, rounds, curve)
    numbers = same.numbers + other.numbers
    low = min(0.0, *numbers)
    high = max(0.05, *numbers)
    reach = high - low
    axes.set_ylim(low - 0.06 * reach, high + 0.06 * reach)
    axes.set_ylabel("mean cosine between clients")
    axes.grid(axis="y")
    gap = style.fitting(width, 0.09, 0.15) * reach
    spots = style.spread([float(curve.last or 0.0) for curve in curves], gap)
    for curve, spot in zip(curves, spots, strict=True):
        number = f"{curve.last:.2f}"
        text = style.fitting(
            width,
            f"{curve.name} {number}",
            f"{curve.name}\n{number}",
        )
        _label(
            axes,
            words.typographic(text),
            spot,
            curve.colour,
        )
    return figure


def mean_matrix(rounds: Rounds) -> Floats | None:
    """The cosines by index [R, R] over the later half of the rounds; NaN where there was no pair,
    None without any.

    ``rounds``: the lines of cosines.jsonl.
    """
    later = rounds[len(rounds) // 2 :]
    found = [np.array(line["matrix"], dtype=float) for line in later]
    shapes = {each.shape for each in found}
    if len(shapes) != 1:
        return None
    stacked = np.ma.masked_invalid(np.stack(found))
    if stacked.mask.all():
        return None
    mean = stacked.mean(axis=0)
    return np.asarray(mean.filled(np.nan))


def site_name(site: str) -> str:
    """``encoder.layer.3.attention.self.query`` -> ``3 query``."""
    parts = site.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return " ".join([*numbers[:1], parts[-1]])


# ------------------------------------------------------------------------- text
def _losses_text(rounds: Rounds) -> str:
    starts = _known(rounds, "n_init")
    merged = _known(rounds, "n_init_adapter")
    means = _known(rounds, "n_agg")
    said = []
    if starts and not any(starts):
        which = _of_rounds(len(starts))
        said.append(f"Here nothing is lost on the way down: exactly 0 in {which}.")
    elif starts:
        lost = _number(float(np.mean(starts)))
        said.append(f"On the way down a client loses {lost} on average.")
    if merged != starts:
        lacks = _number(float(np.mean(merged)))
        said.append(f"Its adapter alone, without what is merged into the base, lacks {lacks}.")
    if means and max(means) <= _ROUNDING:
        said.append("The mean loses nothing but rounding.")
    elif means:
        average = _number(float(np.mean(means)))
        last = _number(means[-1])
        said.append(f"The mean loses {average} on average, {last} in the last round.")
    if _known(rounds, "bound"):
        said.append(
            "The bound is the most that it could be: how far the clients' columns are from their "
            "mean, times the same "
            "of their rows."
        )
    return (
        "Two things can be lost in a round: a client may start from less than the global update "
        "(start), and the new "
        "global update may differ from the mean of what the clients trained (aggregation). Both "
        "are Frobenius norms of "
        "updates of the base weights, over all adapted layers.\n\n" + " ".join(said)
    )


def _cosine_text(rounds: Rounds, matrix: Floats | None) -> str:
    same = other = None
    for line in rounds:
        if line["cos_same"] is not None and line["cos_other"] is not None:
            same = line["cos_same"]
            other = line["cos_other"]
    text = (
        "A rank index is one column of B with one row of A. To average by index makes sense where "
        "the clients' modules "
        "of one index point the same way."
    )
    if same is not None and other is not None:
        shown = words.typographic(f"{same:.2f} for the same index, {other:.2f} for different ones")
        text += f" At the end their mean cosine is {shown}."
    if matrix is not None:
        text += (
            "\n\nThe matrix shows each pair of indices, as a mean over layers and the later half "
            "of the rounds: a blue "
            "diagonal on pale ground is what one hopes for. An empty cell is a pair that no two "
            "clients trained."
        )
    return text


def _of_rounds(count: int) -> str:
    if count == 1:
        return "the one round"
    return f"all {count} rounds"


def _number(value: float) -> str:
    """``0.052``, ``3.5e−9``."""
    if value == 0 or 0.01 <= abs(value) < 100:
        return words.typographic(f"{value:.2g}")
    return _power(value, 1)


def _power(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return words.typographic(f"{mantissa}e{int(exponent)}")


# ----------------------------------------------------------------------- pieces
def _curve(
    rounds: Rounds,
    key: str,
    name: str,
    role: str,
    dash: str,
    marker: str,
) -> Curve:
    return Curve(
        name,
        [line[key] for line in rounds],
        COLOURS[role],
        dash,
        marker,
    )


def _draw(axes: Axes, rounds: Rounds, curve: Curve, zero: float = 0.0) -> None:
    """The curve's line, exact zeros at ``zero``; a round without a value is bridged."""
    places = []
    values = []
    for line, value in zip(rounds, curve.values, strict=True):
        if value is not None:
            places.append(line["round"])
            values.append(value or zero)
    dots: Plain = {}
    if len(rounds) <= 40:
        dots = {"marker": curve.marker, "markersize": 5.5}
    axes.plot(
        places,
        values,
        color=curve.colour,
        linestyle=_DASHES[curve.dash],
        **dots,
    )


def _log_ticks(
    axes: Axes,
    low: float,
    high: float,
    zero: float | None,
) -> None:
    """Few and plain: powers of ten, with 2 and 5 where there are not many, and a 0 where zeros
    stand.
    """
    steps = [1.0, 2.0, 5.0]
    if math.log10(high / low) > 2.2:
        steps = [1.0]
    within = LogLocator(subs=steps).tick_values(low, high)
    lowest = low / 1.3
    if zero:
        lowest = low / 1.05  # above the line that parts the zeros
    shown = [float(tick) for tick in within if lowest <= tick <= high * 1.3]
    while len(shown) > 7:
        shown = shown[::2]
    if zero:
        shown.insert(0, zero)

    def written(tick: float, place: int) -> str:
        if tick == zero:
            return "0"
        if 1e-3 <= tick < 1e4:
            return f"{tick:g}"
        return _power(tick, 0)

    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(written))


def _rounds_axis(axes: Axes, rounds: Rounds, width: float) -> None:
    axes.set_xlabel("round")
    axes.margins(x=0.02)
    if len(rounds) == 1:
        only = rounds[0]["round"]
        axes.set_xlim(only - 1, only + 1)
    ticks = MaxNLocator(integer=True, nbins=style.fitting(width, 10, 6))
    axes.xaxis.set_major_locator(ticks)


def _label(axes: Axes, text: str, place: float, colour: str) -> None:
    """A curve's name and last value right of it."""
    middle = "center_baseline"
    if "\n" in text:
        middle = "center"
    axes.text(
        1.015,
        place,
        text,
        transform=axes.get_yaxis_transform(),
        va=middle,
        color=colour,
        fontweight="bold",
        linespacing=1.05,
    )


def _matrix(figure: FigureBase, axes: Axes, matrix: Floats) -> None:
    rank = len(matrix)
    largest = float(np.nanmax(np.abs(matrix)))
    reach = max(0.1, math.ceil(10 * largest) / 10)
    edges = np.arange(rank + 1) + 0.5
    known = np.ma.masked_invalid(matrix)
    image = _cells(
        axes,
        edges,
        edges,
        known,
        _SIGNED,
        (-reach, reach),
    )
    axes.set_ylim(rank + 0.5, 0.5)
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(
            MaxNLocator(
                integer=True,
                nbins=8,
                min_n_ticks=1,
            )
        )
    axes.set_xlabel("index at one client")
    axes.set_ylabel("index at another")
    bar = figure.colorbar(
        image,
        ax=axes,
        fraction=0.05,
        pad=0.02,
        ticks=[-reach, 0, reach],
    )
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels([f"−{reach:g}", "0", f"{reach:g}"])


def _cells(
    axes: Axes,
    x: Floats,
    y: Floats,
    values: Floats,
    colours: Colormap,
    reach: tuple[float, float],
) -> QuadMesh:
    """Values [len(y) - 1, len(x) - 1] as cells between the edges x and y, in the colours of what
    lies within the reach.
    """
    low, high = reach
    gaps: Plain = {"rasterized": True}
    if max(len(x), len(y)) <= _MOST_CELLS:
        gaps = {"edgecolors": COLOURS["paper"], "linewidth": 0.8}
    return axes.pcolormesh(
        x,
        y,
        values,
        cmap=colours,
        vmin=low,
        vmax=high or 1.0,
        **gaps,
    )
