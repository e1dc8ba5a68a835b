"""The noise lab's ``noise.jsonl``: what rounds lose on the way down and in the mean, and what an
index means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedgrove.ground import words
from fedgrove.ground.lines import read
from fedgrove.report import style
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import COLOURS

_SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#b35900", "#f2c48d", "#f1f1ee", "#8fc1e3", "#00538a"]
)
_AMOUNT = LinearSegmentedColormap.from_list("amount", ["#f1f1ee", "#f2c48d", "#d98032", "#8a3c00"])
_ROUNDING = (
    1e-6  # an update has a norm of 0.01 and more: less than this is what float32 cannot hold
)
_MOST_CELLS = 24  # above so many rows a matrix has no thin gaps between its cells
_DASHES: dict[str, Any] = {
    "solid": "-",
    "dashed": (0, (5, 1.5)),
    "dotted": (0, (1.2, 1.4)),
    "dashdot": (0, (6, 1.5, 1.2, 1.5)),
}

Rounds = Sequence[Mapping[str, Any]]  # the lines of noise.jsonl


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
        return next((value for value in reversed(self.values) if value is not None), None)


def noise(left: Left) -> list[Section]:
    """What was lost, where, and whether rank indices mean the same to all."""
    rounds = read(left.folder / "noise.jsonl")
    found = []
    if any(line["n_init"] is not None or line["n_agg"] is not None for line in rounds):
        title = "What a round loses between the server and its clients"
        found.append(Section(title, _losses_text(rounds), partial(losses, rounds)))
    if len(rounds) > 1 and any((line["n_agg"] or 0.0) > _ROUNDING for line in rounds):
        text = "Aggregation noise of each adapted layer, the shallowest at the top. Darker is more."
        found.append(Section("Where the mean loses", text, partial(places, rounds)))
    if any(line["cos_same"] is not None or line["cos_other"] is not None for line in rounds):
        matrix = mean_matrix(read(left.folder / "cosines.jsonl"))
        title = "Does a rank index mean the same to every client?"
        found.append(Section(title, _cosine_text(rounds, matrix), partial(cosines, rounds, matrix)))
    return found


# ---------------------------------------------------------------------- figures
def losses(rounds: Rounds, width: float) -> Figure:
    """n_init, n_agg and the bound on a log axis; what is exactly zero stands on a line of its own
    below it.
    """
    figure, axes = style.new_figure(width, 4.0)
    roomy = width > style.NARROW
    curves = [
        _curve(rounds, "bound", "bound", "muted", "dotted", "^"),
        _curve(rounds, "n_agg", "aggregation", "tail", "dashed", "s"),
        _curve(
            rounds,
            "n_init_adapter",
            "start, adapter only" if roomy else "adapter only",
            "local",
            "dashdot",
            "D",
        ),
        _curve(rounds, "n_init", "start", "ours", "solid", "o"),
    ]
    if curves[2].values == curves[3].values:  # nothing is merged into the base: one reading
        del curves[2]
    curves = [curve for curve in curves if curve.last is not None]
    positive = [value for curve in curves for value in curve.values if value]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    decades = max(0.6, math.log10(high / low))
    zero = low / 10 ** (0.28 * decades)  # where exact zeros stand
    has_zero = any(value == 0 for curve in curves for value in curve.values)
    axes.set_yscale("log")
    for curve in curves:
        _draw(
            axes,
            rounds,
            curve,
            [value if value is None else value or zero for value in curve.values],
        )
    if has_zero:
        bottom = zero / 10 ** (0.09 * decades)
    else:
        bottom = low / 10 ** (0.08 * decades)
    axes.set_ylim(bottom, high * 10 ** (0.08 * decades))
    _log_ticks(axes, low, high, zero if has_zero else None)
    if has_zero:
        axes.axhline(
            low / 10 ** (0.16 * decades),
            color=COLOURS["line"],
            linewidth=1.2,
            linestyle=(0, (3, 3)),
        )
    _rounds_axis(axes, rounds, width)
    axes.set_ylabel("norm of what is lost")
    axes.grid(axis="y")
    gap = (0.066 if roomy else 0.125) * math.log10(high * 10 ** (0.08 * decades) / bottom)
    spots = style.spread([math.log10(curve.last or zero) for curve in curves], gap)
    for curve, spot in zip(curves, spots, strict=True):
        _label(
            axes,
            f"{curve.name}{' ' if roomy else chr(10)}{_number(curve.last or 0.0)}",
            10**spot,
            curve.colour,
        )
    return figure


def places(rounds: Rounds, width: float) -> Figure:
    """n_agg of every site over the rounds."""
    sites, roomy = list(rounds[0]["sites"]), width > style.NARROW
    values = np.array([[line["sites"][site]["n_agg"] or 0.0 for line in rounds] for site in sites])
    row = float(np.clip(6.0 / len(sites), 0.09, 0.27))
    figure, axes = style.new_figure(width, 0.9 + row * len(sites))
    edges = np.array([line["round"] - 0.5 for line in rounds] + [rounds[-1]["round"] + 0.5])
    image = _cells(
        axes, edges, np.arange(len(sites) + 1) - 0.5, values, _AMOUNT, 0.0, float(values.max())
    )
    step = math.ceil(0.2 / row)
    if roomy:
        before = "layer "
    else:
        before = ""
    axes.set_yticks(
        range(0, len(sites), step), [before + site_name(site) for site in sites[::step]]
    )
    axes.set_ylim(len(sites) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10 if roomy else 6))
    bar = figure.colorbar(
        image, ax=axes, fraction=0.03 if roomy else 0.06, pad=0.015, aspect=row * len(sites) / 0.13
    )
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(nbins=4)
    bar.update_ticks()
    return figure


def cosines(rounds: Rounds, matrix: np.ndarray | None, width: float) -> Figure:
    """Mean cosine of modules of the same and of another index over rounds, and index by index."""
    beside = width > style.NARROW
    if matrix is None:
        figure, axes = style.new_figure(width, 3.4)
    else:
        figure = Figure(figsize=(width, 4.0 if beside else 7.6), layout="constrained")
        if beside:
            shape: Any = {"ncols": 2, "width_ratios": (1.3, 1)}
        else:
            shape = {"nrows": 2, "height_ratios": (1, 1.2)}
        left, right = figure.subfigures(**shape)
        axes = left.add_subplot()
        _matrix(right, right.add_subplot(), matrix)
    curves = [
        _curve(rounds, "cos_same", "same index", "ours", "solid", "o"),
        _curve(rounds, "cos_other", "other index", "tail", "dashed", "s"),
    ]
    curves = [curve for curve in curves if curve.last is not None]
    axes.axhline(0, color=COLOURS["muted"], linewidth=1)
    for curve in curves:
        _draw(axes, rounds, curve, curve.values)
    numbers = [value for curve in curves for value in curve.values if value is not None]
    low, high = min(0.0, *numbers), max(0.05, *numbers)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    _rounds_axis(axes, rounds, width / 2 if beside and matrix is not None else width)
    axes.set_ylabel("mean cosine between clients")
    axes.grid(axis="y")
    spots = style.spread(
        [float(curve.last or 0.0) for curve in curves], (0.09 if beside else 0.15) * (high - low)
    )
    for curve, spot in zip(curves, spots, strict=True):
        text = f"{curve.name}{' ' if beside else chr(10)}{curve.last:.2f}"
        _label(axes, words.typographic(text), spot, curve.colour)
    return figure


def mean_matrix(rounds: Rounds) -> np.ndarray | None:
    """The cosines by index [R, R] over the later half of the rounds; NaN where there was no pair,
    None without any.

    ``rounds``: the lines of cosines.jsonl.
    """
    found = [np.array(line["matrix"], dtype=float) for line in rounds[len(rounds) // 2 :]]
    if not found or len({each.shape for each in found}) != 1:
        return None
    stacked = np.ma.masked_invalid(np.stack(found))
    if stacked.mask.all():
        return None
    return np.asarray(stacked.mean(axis=0).filled(np.nan))


def site_name(site: str) -> str:
    """``encoder.layer.3.attention.self.query`` -> ``3 query``."""
    parts = site.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return " ".join([*numbers[:1], parts[-1]])


# ------------------------------------------------------------------------- text
def _losses_text(rounds: Rounds) -> str:
    starts, merged, means, bounds = (
        [line[key] for line in rounds if line[key] is not None]
        for key in ("n_init", "n_init_adapter", "n_agg", "bound")
    )
    said = []
    if starts and not any(starts):
        said.append(
            f"Here nothing is lost on the way down: exactly 0 in {_of_rounds(len(starts))}."
        )
    elif starts:
        said.append(f"On the way down a client loses {_number(np.mean(starts))} on average.")
    if merged != starts:
        said.append(
            f"Its adapter alone, without what is merged into the base, lacks "
            f"{_number(np.mean(merged))}."
        )
    if means and max(means) <= _ROUNDING:
        said.append("The mean loses nothing but rounding.")
    elif means:
        said.append(
            f"The mean loses {_number(np.mean(means))} on average, {_number(means[-1])} in the "
            f"last round."
        )
    if bounds:
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


def _cosine_text(rounds: Rounds, matrix: np.ndarray | None) -> str:
    pairs = [(line["cos_same"], line["cos_other"]) for line in rounds]
    same, other = next(
        ((a, b) for a, b in reversed(pairs) if a is not None and b is not None), (None, None)
    )
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
def _curve(rounds: Rounds, key: str, name: str, role: str, dash: str, marker: str) -> Curve:
    return Curve(name, [line[key] for line in rounds], COLOURS[role], dash, marker)


def _draw(axes: Axes, rounds: Rounds, curve: Curve, values: Sequence[float | None]) -> None:
    """The curve's line through ``values``; a round without one is bridged."""
    there = [
        (line["round"], value)
        for line, value in zip(rounds, values, strict=True)
        if value is not None
    ]
    if len(rounds) <= 40:
        dots: dict[str, Any] = {"marker": curve.marker, "markersize": 5.5}
    else:
        dots = {}
    axes.plot(
        [at for at, _ in there],
        [value for _, value in there],
        color=curve.colour,
        linestyle=_DASHES[curve.dash],
        **dots,
    )


def _log_ticks(axes: Axes, low: float, high: float, zero: float | None) -> None:
    """Few and plain: powers of ten, with 2 and 5 where there are not many, and a 0 where zeros
    stand.
    """
    many = math.log10(high / low) > 2.2
    within = LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0)).tick_values(low, high)
    lowest = low / (1.05 if zero else 1.3)  # above the line that parts the zeros
    shown = [float(tick) for tick in within if lowest <= tick <= high * 1.3]
    while len(shown) > 7:
        shown = shown[::2]
    axes.yaxis.set_major_locator(FixedLocator([*([zero] if zero else []), *shown]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(
            lambda tick, _: (
                "0" if tick == zero else f"{tick:g}" if 1e-3 <= tick < 1e4 else _power(tick, 0)
            )
        )
    )


def _rounds_axis(axes: Axes, rounds: Rounds, width: float) -> None:
    axes.set_xlabel("round")
    axes.margins(x=0.02)
    if len(rounds) == 1:
        axes.set_xlim(rounds[0]["round"] - 1, rounds[0]["round"] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=style.fitting(width, 10, 6)))


def _label(axes: Axes, text: str, place: float, colour: str) -> None:
    """A curve's name and last value right of it."""
    if "\n" in text:
        middle = "center"
    else:
        middle = "center_baseline"
    at = axes.get_yaxis_transform()
    axes.text(
        1.015,
        place,
        text,
        transform=at,
        va=middle,
        color=colour,
        fontweight="bold",
        linespacing=1.05,
    )


def _matrix(figure: FigureBase, axes: Axes, matrix: np.ndarray) -> None:
    rank = len(matrix)
    reach = max(0.1, math.ceil(10 * float(np.nanmax(np.abs(matrix)))) / 10)
    edges = np.arange(rank + 1) + 0.5
    image = _cells(axes, edges, edges, np.ma.masked_invalid(matrix), _SIGNED, -reach, reach)
    axes.set_ylim(rank + 0.5, 0.5)
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("index at one client")
    axes.set_ylabel("index at another")
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, ticks=[-reach, 0, reach])
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels([f"−{reach:g}", "0", f"{reach:g}"])


def _cells(axes: Axes, x: Any, y: Any, values: Any, colours: Any, low: float, high: float) -> Any:
    few = max(len(x), len(y)) <= _MOST_CELLS
    if few:
        gaps: dict[str, Any] = {"edgecolors": COLOURS["paper"], "linewidth": 0.8}
    else:
        gaps = {"rasterized": True}
    return axes.pcolormesh(x, y, values, cmap=colours, vmin=low, vmax=high or 1.0, **gaps)
