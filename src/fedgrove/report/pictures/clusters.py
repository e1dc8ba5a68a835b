"""HiLoRA's ``clusters.json``: who is like whom, what each tier adds, and how far the tiers say the
same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fedgrove.ground import words
from fedgrove.ground.plain import Given
from fedgrove.report import style
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import COLOURS, CYCLE
from fedgrove.report.tiers import Tiers

_CELLS = 400  # of more clients the map shows that many, evenly
_MEMBERS = 24  # clients of a cluster that are named in the table
_NAMED = 40  # more clients than that have no room for their names beside the map
_GAP = 1.2  # inches between the map and what stands beside it
_PAIRS = {  # how each pair of tiers is drawn
    "root-cluster": ("root and cluster", CYCLE[0], "-", "o"),
    "root-leaf": ("root and leaf", CYCLE[1], (0, (5, 1.5)), "s"),
    "cluster-leaf": ("cluster and leaf", CYCLE[2], (0, (6, 1.5, 1.2, 1.5)), "D"),
}


Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def clusters(left: Left) -> list[Section]:
    """The clusters, what each tier adds and how far tiers overlap; nothing before there are any."""
    if not left.has("clusters.json"):
        return []
    run_dir = left.folder
    beside = left.others("clusters.json")
    content = left.read("clusters.json")
    picture = None
    if len(content["clients"]) > 2:  # two have but one distance
        picture = partial(heat, content)
    who = Section(
        "Who is like whom: the clusters",
        _who(content),
        picture,
        _members(content),
    )
    found = [who]
    tiers = Tiers.read(run_dir, content)
    if len(tiers.names) > 1:
        adds = Section(
            "What each tier adds",
            _adds(tiers),
            partial(steps, tiers),
            tiers.table(),
        )
        found.append(adds)
    if any(_curves(content).values()):
        panels = [(_penalties(run_dir), content)]
        for path in beside:
            text = (path / "clusters.json").read_text("utf-8")
            panels.append((_penalties(path), json.loads(text)))
        said = _overlap_words(run_dir, beside)
        found.append(Section("How far the tiers overlap", said, partial(overlap, panels)))
    return found


# ---------------------------------------------------------------------- clusters
@dataclass(frozen=True)
class Sheet:
    """Where the map lies, in inches: a square of ``side``, ``left`` of it the names."""

    width: float
    height: float
    left: float
    side: float

    @classmethod
    def of(cls, names: Sequence[str], width: float) -> Sheet:
        left = 0.35
        if len(names) <= _NAMED:
            left = 0.15 + 0.088 * max(map(len, names))
        if width > style.NARROW:  # the eigenvalues stand beside the map
            side = 5.3
            height = side + 0.85
        else:
            side = width - left - 0.25
            height = side + 0.85 + 2.9
        return cls(width, height, left, side)

    def axes(
        self,
        figure: Figure,
        left: float,
        bottom: float,
        size: tuple[float, float],
    ) -> Axes:
        """Axes at so many inches, of so many inches."""
        across, up = size
        place = (
            left / self.width,
            bottom / self.height,
            across / self.width,
            up / self.height,
        )
        return figure.add_axes(place)


def heat(content: Given, width: float) -> Figure:
    """The clients' distances, ordered by cluster, with the clusters' frames; beside it the
    Laplacian's eigenvalues.
    """
    names, labels, order = _ordered(content)
    distances = np.array(content["distances"])[np.ix_(order, order)]
    longest = style.fitting(width, 20, 14)
    names = [words.shorten(name, longest) for name in names]
    sheet = Sheet.of(names, width)
    side = sheet.side
    figure = Figure(figsize=(width, sheet.height))
    top = 1 - (side + 0.15) / sheet.height
    axes = figure.add_axes(
        (
            sheet.left / width,
            top,
            side / width,
            side / sheet.height,
        )
    )
    low, high = _reach(distances)
    _map(axes, distances, low, high)
    _frames(axes, labels)
    _names(axes, names, side)
    _scale(figure, sheet, low, high)
    if width > style.NARROW:
        left = sheet.left + side + _GAP
        across = width - sheet.left - side - _GAP - 0.12
        beside = figure.add_axes(
            (
                left / width,
                top,
                across / width,
                side / sheet.height,
            )
        )
    else:
        beside = sheet.axes(
            figure,
            0.6,
            0.62,
            (width - 0.75, 1.95),
        )
    _eigenvalues(beside, content["eigenvalues"], len(set(labels)))
    return figure


def _map(axes: Axes, distances: Floats, low: float, high: float) -> None:
    """The distances as tiles, the nearer the darker; none of a client with itself."""
    count = len(distances)
    spaced = np.linspace(0, count - 1, min(count, _CELLS))
    shown = np.unique(spaced.astype(int))
    near = (distances[np.ix_(shown, shown)] - low) / (high - low or 1.0)
    itself = np.eye(len(shown), dtype=bool)
    axes.imshow(
        _shade(near, itself),
        interpolation="none",
        extent=(-0.5, count - 0.5, count - 0.5, -0.5),
        aspect="equal",
    )
    axes.set_xticks([])
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.spines[:].set_visible(False)


def _frames(axes: Axes, labels: Sequence[int]) -> None:
    """A frame around each cluster, and its label right of the map."""
    count = len(labels)
    for first, last, label in _runs(labels):
        axes.plot(
            np.array([first, last, last, first, first]) - 0.5,
            np.array([first, first, last, last, first]) - 0.5,
            color=COLOURS["ink"],
            linewidth=1.8,
            solid_joinstyle="miter",
            clip_on=False,
        )
        axes.text(
            count - 0.5 + 0.018 * count,
            (first + last) / 2 - 0.5,
            str(label),
            va="center",
            color=COLOURS["ink"],
            fontweight="bold",
        )


def _names(axes: Axes, names: Sequence[str], side: float) -> None:
    """The clients beside the map, or how many they are."""
    count = len(names)
    if count <= _NAMED:
        axes.set_yticks(range(count), names)
    else:
        axes.set_yticks([], [])
    size = min(10.5, 72 * side / count * 0.9)
    axes.tick_params(
        axis="y",
        labelcolor=COLOURS["ink"],
        labelsize=size,
    )
    if count > _NAMED:
        axes.set_ylabel(f"{count} clients, by cluster")


def _shade(values: Floats, hidden: Flags | None = None) -> Floats:
    """Blue where near (0), transparent where far (1), so that one image serves light and dark
    pages.
    """
    image = np.empty((*values.shape, 4))
    image[..., :3] = to_rgb(COLOURS["ours"])
    near = 1 - np.clip(values, 0, 1)
    image[..., 3] = 0.04 + 0.96 * near**1.3
    if hidden is not None:
        image[hidden, 3] = 0.0
    return image


def _scale(figure: Figure, sheet: Sheet, low: float, high: float) -> None:
    """The key below the map: which shade is which distance."""
    width = sheet.width
    height = sheet.height
    bottom = 1 - (sheet.side + 0.15 + 0.32) / height
    across = min(2.2, sheet.side)
    bar = figure.add_axes((sheet.left / width, bottom, across / width, 0.14 / height))
    bar.imshow(
        _shade(np.linspace(0, 1, 64)[None, :]),
        aspect="auto",
        extent=(0, 1, 0, 1),
        interpolation="none",
    )
    bar.set_yticks([])
    bar.set_xticks([0, 1], [f"near {low:.2f}", f"far {high:.2f}"])
    near, far = bar.get_xticklabels()
    near.set_horizontalalignment("left")
    far.set_horizontalalignment("right")
    bar.spines[:].set_visible(False)


def _reach(distances: Floats) -> tuple[float, float]:
    """The smallest and largest distance between two clients."""
    itself = np.eye(len(distances), dtype=bool)
    pairs = distances[~itself]
    if pairs.size:
        return (float(pairs.min()), float(pairs.max()))
    return (0.0, 1.0)


def _eigenvalues(axes: Axes, values: Sequence[float], count: int) -> None:
    """The smallest eigenvalues; the gap after the last one that counts is as many clusters as there
    are.

    The first is 0 whatever the clients are like: it is shown only where the gap after it was
    chosen.
    """
    first = 0
    if count > 1:
        first = 1
    last = min(len(values), max(count + 4, 14))
    places = np.arange(first + 1, last + 1)
    shown = np.array(values[first:last])
    inside = places <= count
    axes.plot(
        places,
        shown,
        color=COLOURS["line"],
        linewidth=1.5,
        zorder=1,
    )
    axes.scatter(
        places[inside],
        shown[inside],
        s=46,
        color=COLOURS["ours"],
        zorder=3,
    )
    axes.scatter(
        places[~inside],
        shown[~inside],
        s=40,
        zorder=3,
        facecolors=COLOURS["paper"],
        edgecolors=COLOURS["base"],
        linewidths=1.5,
    )
    reach = float(np.ptp(shown)) or 1.0
    axes.set_ylim(float(shown.min()) - 0.16 * reach, float(shown.max()) + 0.08 * reach)
    axes.set_xlim(first + 0.4, last + 0.6)
    if count < last:
        _gap(
            axes,
            count,
            values[count - 1],
            values[count],
            left=count > 0.6 * last,
        )
    axes.set_xlabel("eigenvalues of the Laplacian, by rank")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(axis="y")


def _gap(
    axes: Axes,
    count: int,
    low: float,
    high: float,
    *,
    left: bool,
) -> None:
    """The eigengap and its size; the words ``left`` of it where there is more room for them."""
    axes.fill_between(
        [count, count + 1],
        low,
        high,
        color=COLOURS["ours"],
        alpha=0.13,
        linewidth=0,
    )
    place = (count + 1.15, low)
    side = "left"
    if left:
        place = (count - 0.15, high)
        side = "right"
    axes.annotate(
        f"gap {high - low:.2g}\nafter {count}",
        place,
        ha=side,
        va="center",
        color=COLOURS["ours"],
        fontweight="bold",
    )


def _ordered(content: Given) -> tuple[list[str], list[int], list[int]]:
    """Names and labels by cluster, and in it by mean distance to its members, the most typical
    first.
    """
    names = content["clients"]
    labels = content["labels"]
    distances = np.array(content["distances"])
    members = np.array(labels)
    mates = {label: np.flatnonzero(members == label) for label in set(labels)}

    def key(row: int) -> tuple[int, float, str]:
        label = labels[row]
        typical = distances[row, mates[label]].mean()
        return label, round(float(typical), 9), names[row]

    order = sorted(range(len(names)), key=key)
    names = [names[row] for row in order]
    labels = [labels[row] for row in order]
    return names, labels, order


def _runs(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, one past the last, label) of each stretch of one label."""
    found = []
    first = 0
    for label, members in groupby(labels):
        last = first + len(list(members))
        found.append((first, last, label))
        first = last
    return found


def _who(content: Given) -> str:
    clients = words.count(len(content["clients"]), "client")
    groups = words.count(len(set(content["labels"])), "cluster")
    what = "their B after local training"
    if content.get("basis") == "B - B_start":
        what = "the changes that local training made to their B"
    texts = [
        f"At the end of the root tier the server grouped {clients} into "
        f"{groups}, once. The map shows the distance between any two of "
        f"them: how far apart the "
        f"subspaces of {what} are, averaged over layers. Frames are the clusters; dark inside a "
        f"frame and pale "
        "outside it is what a good grouping looks like.",
        "There are as many clusters as eigenvalues before their largest jump, the eigengap; the "
        "first eigenvalue is "
        "always 0 and not drawn. No clear jump means no clear groups.",
    ]
    if content.get("late"):
        late = [f"{name} (cluster {label})" for name, label in sorted(content["late"].items())]
        names = words.some(late, _MEMBERS)
        texts.append(f"Joined later, placed by a probe and so not on the map: {names}.")
    if placed := content.get("placed"):
        texts.append(
            f"The map shows landmarks, a draw from all; {len(placed):,} more clients were placed "
            "in the cluster whose landmarks they are closest to."
        )
    return "\n\n".join(texts)


def _members(content: Given) -> list[list[str]]:
    labels = dict(zip(content["clients"], content["labels"], strict=True))
    labels |= content.get("placed", {})
    labels |= content.get("late", {})
    members: dict[int, list[str]] = {}
    for name, label in labels.items():
        names = members.setdefault(label, [])
        names.append(name)
    rows = [["cluster", "clients", "who"]]
    for label, names in sorted(members.items()):
        who = words.some(sorted(names), _MEMBERS)
        rows.append([str(label), str(len(names)), who])
    return rows


# ---------------------------------------------------------------------- tiers
def steps(tiers: Tiers, width: float) -> Figure:
    """Every client's metric after each tier, thin; their mean with one standard deviation,
    thick.
    """
    figure, axes = style.new_figure(width, 4.3)
    places = list(range(len(tiers.names)))
    for name, values in tiers.clients.items():
        colour = COLOURS["base"]
        label = tiers.labels.get(name)
        if label is not None:
            colour = CYCLE[label % len(CYCLE)]
        axes.plot(
            places,
            values,
            color=colour,
            linewidth=1.1,
            alpha=0.55,
            zorder=1,
        )
    _steps_mean(axes, tiers, places)
    axes.set_xticks(places, tiers.names, color=COLOURS["ink"])
    side = style.fitting(width, 0.3, 0.5)
    axes.set_xlim(-side, places[-1] + side)
    axes.margins(y=0.09)
    axes.set_ylabel(f"{tiers.metric} of a client")

    def written(value: float, place: int) -> str:
        if tiers.percent:
            return f"{100 * value:.0f} %"
        return f"{value:g}"

    axes.yaxis.set_major_formatter(FuncFormatter(written))
    axes.grid(axis="y")
    return figure


def _steps_mean(axes: Axes, tiers: Tiers, places: Sequence[int]) -> None:
    """The clients' mean after each tier with one standard deviation, in numbers too."""
    means = tiers.means
    spreads = tiers.spreads
    axes.errorbar(
        places,
        means,
        yerr=spreads,
        color=COLOURS["ink"],
        linewidth=2.6,
        marker="o",
        markersize=8,
        capsize=6,
        capthick=2,
        elinewidth=2,
        zorder=4,
    )
    box = {
        "facecolor": COLOURS["paper"],
        "edgecolor": "none",
        "alpha": 0.8,
        "pad": 1.5,
    }
    for place, value, spread in zip(places, means, spreads, strict=True):
        mean = _number(value, tiers.percent)
        deviation = _number(spread, tiers.percent)
        axes.annotate(
            f"{mean} ± {deviation}",
            (place, value + spread),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            bbox=box,
            zorder=5,
        )


def _adds(tiers: Tiers) -> str:
    texts = [
        "Thin lines are clients, coloured by cluster; the thick one is their mean with one "
        "standard deviation. A "
        "cascade that works climbs, and its spread shrinks: the root serves everyone somewhat, the "
        "cluster and the "
        "leaf bring back those that it served badly. Each point is the model at the end of that "
        "tier’s rounds, head "
        "included."
    ]
    if tiers.unseen:
        parts = [f"{_number(value, tiers.percent)} {when}" for when, value in tiers.unseen.items()]
        many = words.count(tiers.newcomers, "client")
        texts.append(f"{many} that never trained: {', '.join(parts)}.")
    if tiers.missing:
        texts.append(f"Not evaluated, and so not shown: the end of {' and '.join(tiers.missing)}.")
    return "\n\n".join(texts)


def _number(value: float, percent: bool) -> str:
    return words.typographic(words.score(value, percent=percent))


# ---------------------------------------------------------------------- overlap
def overlap(
    panels: Sequence[tuple[str, Given]],
    width: float,
) -> Figure:
    """Mean cos² between the tiers' subspaces, layer by layer, and what random subspaces would have.

    A panel for each run, on one scale: with and without the penalty, where such runs are set side
    by side.
    """
    panels = [(title, content) for title, content in panels if any(_curves(content).values())]
    columns = style.fitting(width, len(panels), 1)
    rows = math.ceil(len(panels) / columns)
    figure, grid = style.new_grid(
        width,
        3.6 * rows,
        rows,
        columns,
    )
    top = max(_top(content) for _, content in panels)
    for axes, (title, content) in zip(grid, panels, strict=True):
        _overlap_panel(axes, content, top)
        if len(panels) > 1:
            axes.set_title(title, loc="left", fontsize=9)
    return figure


def _overlap_panel(axes: Axes, content: Given, top: float) -> None:
    layers = content["layers"]
    named = []
    for pair, rows in _curves(content).items():
        if not rows:
            continue
        title, colour, dash, marker = _PAIRS[pair]
        values = np.array(rows)
        axes.fill_between(
            layers,
            values.min(0),
            values.max(0),
            color=colour,
            alpha=0.10,
            linewidth=0,
        )
        means = values.mean(0)
        axes.plot(
            layers,
            means,
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=5,
        )
        named.append((title, float(means[-1]), colour))
    for chance in sorted(set(content.get("chance", {}).values())):
        axes.axhline(
            chance,
            color=COLOURS["base"],
            linewidth=1.4,
            linestyle=(0, (2, 2)),
        )
        named.append((f"chance {chance:.3f}", chance, COLOURS["muted"]))
    axes.set_ylim(0, top * 1.12 or 1.0)
    places = style.spread([y for _, y, _ in named], top * 0.085)
    for (title, _, colour), place in zip(named, places, strict=True):
        axes.text(
            1.015,
            place,
            title,
            transform=axes.get_yaxis_transform(),
            va="center_baseline",
            color=colour,
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("mean cos²")
    every = 1
    if len(layers) > 16:
        every = math.ceil(len(layers) / 12)
    axes.set_xticks(layers[::every])
    axes.margins(x=0.02)
    axes.grid(axis="y")


def _top(content: Given) -> float:
    values = _chances(content)
    for rows in _curves(content).values():
        for row in rows:
            values.extend(row)
    return max(values)


def _curves(content: Given) -> dict[str, list[list[float]]]:
    """By pair of tiers: one row for each cluster or client, one number for each layer."""
    overlaps = content.get("overlap", {})
    found = {}
    for pair in _PAIRS:
        rows = overlaps.get(pair, [])
        if isinstance(rows, Mapping):
            rows = rows.values()
        found[pair] = [row for row in rows if row is not None]
    return found


def _chances(content: Given) -> list[float]:
    return list(content.get("chance", {}).values())


def _gammas(run_dir: Path) -> tuple[float, float] | None:
    import tomllib

    try:
        text = (run_dir / "job.toml").read_text(encoding="utf-8")
        method = tomllib.loads(text).get("method", {})
    except (OSError, ValueError):
        return None
    if "gamma_c" in method and "gamma_l" in method:
        return method["gamma_c"], method["gamma_l"]
    return None


def _penalties(run_dir: Path) -> str:
    """A run's name beside others: its penalties."""
    gammas = _gammas(run_dir)
    if gammas is None:
        return run_dir.name
    if not any(gammas):
        return "without a penalty"
    return f"γ_c = {gammas[0]:g}, γ_l = {gammas[1]:g}"


def _overlap_words(run_dir: Path, beside: Sequence[Path]) -> str:
    texts = [
        "Two tiers that span the same directions (1) say the same thing twice; orthogonal ones (0) "
        "each add something. "
        "The dotted line is what random subspaces of these sizes would have; lines at or below it "
        "mean tiers that keep "
        "out of each other’s way. Bands hold all clusters or clients."
    ]
    gammas = _gammas(run_dir)
    if gammas is not None:
        cluster, leaf = gammas
        said = (
            f"This run’s penalties: γ_c = {cluster:g} towards the root, γ_l = {leaf:g} "
            f"between leaf and cluster."
        )
        if not beside:
            said += (
                " To see what they do, set a run with both at 0 beside it: fedgrove report "
                "RUN --beside OTHER."
            )
        texts.append(said)
    return "\n\n".join(texts)
