"""HiLoRA's ``clusters.json``: who is like whom, what each tier adds, and how far the tiers say the
same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedgrove.ground import words
from fedgrove.report import style
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import COLOURS, CYCLE
from fedgrove.report.tiers import Tiers

_CELLS = 400  # of more clients the map shows that many, evenly
_MEMBERS = 24  # clients of a cluster that are named in the table
_NAMED = 40  # more clients than that have no room for their names beside the map
_PAIRS = {  # how each pair of tiers is drawn
    "root-cluster": ("root and cluster", CYCLE[0], "-", "o"),
    "root-leaf": ("root and leaf", CYCLE[1], (0, (5, 1.5)), "s"),
    "cluster-leaf": ("cluster and leaf", CYCLE[2], (0, (6, 1.5, 1.2, 1.5)), "D"),
}


def clusters(left: Left) -> list[Section]:
    """The clusters, what each tier adds and how far tiers overlap; nothing before there are any."""
    if not left.has("clusters.json"):
        return []
    run_dir, beside = left.folder, left.others("clusters.json")
    content = left.read("clusters.json")
    picture = (
        partial(heat, content) if len(content["clients"]) > 2 else None
    )  # two have but one distance
    found = [Section("Who is like whom: the clusters", _who(content), picture, _members(content))]
    tiers = Tiers.read(run_dir, content)
    if len(tiers.names) > 1:
        found.append(
            Section("What each tier adds", _adds(tiers), partial(steps, tiers), tiers.table())
        )
    if any(_curves(content).values()):
        panels = [
            (_penalties(path), json.loads((path / "clusters.json").read_text("utf-8")))
            for path in (run_dir, *beside)
        ]
        text = _overlap_words(run_dir, beside)
        found.append(Section("How far the tiers overlap", text, partial(overlap, panels)))
    return found


# ---------------------------------------------------------------------- clusters
def heat(content: Mapping[str, Any], width: float) -> Figure:
    """The clients' distances, ordered by cluster, with the clusters' frames; beside it the
    Laplacian's eigenvalues.
    """
    names, labels, order = _ordered(content)
    distances = np.array(content["distances"])[np.ix_(order, order)]
    count, wide = len(names), width > style.NARROW
    named = count <= _NAMED
    names = [words.shorten(name, 20 if wide else 14) for name in names]
    if named:
        left = 0.15 + 0.088 * max(map(len, names))
    else:
        left = 0.35
    if wide:
        side = 5.3
    else:
        side = width - left - 0.25
    gap = 1.2
    if wide:
        height = side + 0.85
    else:
        height = side + 0.85 + 2.9
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, 1 - (side + 0.15) / height, side / width, side / height))
    low, high = _reach(distances)
    shown = np.unique(np.linspace(0, count - 1, min(count, _CELLS)).astype(int))
    near = (distances[np.ix_(shown, shown)] - low) / (high - low or 1.0)
    _tiles(axes, _shade(near, np.eye(len(shown), dtype=bool)), count)
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
            count - 0.5 + 0.018 * count, (first + last) / 2 - 0.5, str(label), va="center", color=COLOURS["ink"],
            fontweight="bold",
        )  # fmt: skip
    axes.set_yticks(range(count) if named else [], names if named else [])
    axes.tick_params(
        axis="y", labelcolor=COLOURS["ink"], labelsize=min(10.5, 72 * side / count * 0.9)
    )
    if not named:
        axes.set_ylabel(f"{count} clients, by cluster")
    _scale(figure, axes, low, high, left, side, height, width)
    if wide:
        place = (
            (left + side + gap) / width,
            1 - (side + 0.15) / height,
            (width - left - side - gap - 0.12) / width,
            side / height,
        )
    else:
        place = (0.6 / width, 0.62 / height, (width - 0.75) / width, 1.95 / height)
    _eigenvalues(figure.add_axes(place), content["eigenvalues"], len(set(labels)))
    return figure


def _tiles(axes: Axes, colours: Any, count: int) -> None:
    axes.imshow(
        colours, interpolation="none", extent=(-0.5, count - 0.5, count - 0.5, -0.5), aspect="equal"
    )
    axes.set_xticks([])
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.spines[:].set_visible(False)


def _shade(values: Any, hidden: Any = False) -> Any:
    """Blue where near (0), transparent where far (1), so that one image serves light and dark
    pages.
    """
    image = np.empty((*values.shape, 4))
    image[..., :3] = to_rgb(COLOURS["ours"])
    image[..., 3] = np.where(hidden, 0.0, 0.04 + 0.96 * (1 - np.clip(values, 0, 1)) ** 1.3)
    return image


def _scale(
    figure: Figure,
    axes: Axes,
    low: float,
    high: float,
    left: float,
    side: float,
    height: float,
    width: float,
) -> None:
    """The key below the map: which shade is which distance."""
    bar = figure.add_axes(
        (left / width, 1 - (side + 0.15 + 0.32) / height, min(2.2, side) / width, 0.14 / height)
    )
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


def _reach(distances: Any) -> tuple[float, float]:
    """The smallest and largest distance between two clients."""
    pairs = distances[~np.eye(len(distances), dtype=bool)]
    if pairs.size:
        return (float(pairs.min()), float(pairs.max()))
    return (0.0, 1.0)


def _eigenvalues(axes: Axes, values: Sequence[float], count: int) -> None:
    """The smallest eigenvalues; the gap after the last one that counts is as many clusters as there
    are.

    The first is 0 whatever the clients are like: it is shown only where the gap after it was
    chosen.
    """
    if count > 1:
        first = 1
    else:
        first = 0
    last = min(len(values), max(count + 4, 14))
    places, shown = np.arange(first + 1, last + 1), np.array(values[first:last])
    inside = places <= count
    axes.plot(places, shown, color=COLOURS["line"], linewidth=1.5, zorder=1)
    axes.scatter(places[inside], shown[inside], s=46, color=COLOURS["ours"], zorder=3)
    outside: Any = {
        "facecolors": COLOURS["paper"],
        "edgecolors": COLOURS["base"],
        "linewidths": 1.5,
    }
    axes.scatter(places[~inside], shown[~inside], s=40, zorder=3, **outside)
    reach = float(np.ptp(shown)) or 1.0
    axes.set_ylim(float(shown.min()) - 0.16 * reach, float(shown.max()) + 0.08 * reach)
    axes.set_xlim(first + 0.4, last + 0.6)
    if count < last:
        low, high = values[count - 1], values[count]
        axes.fill_between(
            [count, count + 1], low, high, color=COLOURS["ours"], alpha=0.13, linewidth=0
        )
        left = count > 0.6 * last  # where there is more room for the words
        axes.annotate(
            f"gap {high - low:.2g}\nafter {count}",
            (count - 0.15, high) if left else (count + 1.15, low),
            ha="right" if left else "left",
            va="center",
            color=COLOURS["ours"],
            fontweight="bold",
        )
    axes.set_xlabel("eigenvalues of the Laplacian, by rank")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(axis="y")


def _ordered(content: Mapping[str, Any]) -> tuple[list[str], list[int], list[int]]:
    """Names and labels by cluster, and in it by mean distance to its members, the most typical
    first.
    """
    names, labels, distances = content["clients"], content["labels"], np.array(content["distances"])

    members = np.array(labels)
    mates = {label: np.flatnonzero(members == label) for label in set(labels)}

    def key(row: int) -> tuple[int, float, str]:
        typical = distances[row, mates[labels[row]]].mean()
        return labels[row], round(float(typical), 9), names[row]

    order = sorted(range(len(names)), key=key)
    return [names[row] for row in order], [labels[row] for row in order], order


def _runs(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, one past the last, label) of each stretch of one label."""
    starts = [row for row, label in enumerate(labels) if row == 0 or labels[row - 1] != label]
    ends = [*starts[1:], len(labels)]
    return [(first, last, labels[first]) for first, last in zip(starts, ends, strict=True)]


def _who(content: Mapping[str, Any]) -> str:
    count, many = len(set(content["labels"])), len(content["clients"])
    change = content.get("basis") == "B - B_start"
    if change:
        what = "the changes that local training made to their B"
    else:
        what = "their B after local training"
    texts = [
        f"At the end of the root tier the server grouped {words.count(many, 'client')} into "
        f"{words.count(count, 'cluster')}, once. The map shows the distance between any two of "
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
    return "\n\n".join(texts)


def _members(content: Mapping[str, Any]) -> list[list[str]]:
    labels: dict[int, list[str]] = {}
    for name, label in [
        *zip(content["clients"], content["labels"], strict=True),
        *content.get("late", {}).items(),
    ]:
        labels.setdefault(label, []).append(name)
    rows = [
        [str(label), str(len(names)), words.some(sorted(names), _MEMBERS)]
        for label, names in sorted(labels.items())
    ]
    return [["cluster", "clients", "who"], *rows]


# ---------------------------------------------------------------------- tiers
def steps(tiers: Tiers, width: float) -> Figure:
    """Every client's metric after each tier, thin; their mean with one standard deviation,
    thick.
    """
    figure, axes = style.new_figure(width, 4.3)
    places = list(range(len(tiers.names)))
    for name, values in tiers.clients.items():
        label = tiers.labels.get(name)
        if label is None:
            colour = COLOURS["base"]
        else:
            colour = CYCLE[label % len(CYCLE)]
        axes.plot(places, values, color=colour, linewidth=1.1, alpha=0.55, zorder=1)
    means, spreads = tiers.means, tiers.spreads
    axes.errorbar(
        places, means, yerr=spreads, color=COLOURS["ink"], linewidth=2.6, marker="o", markersize=8, capsize=6,
        capthick=2, elinewidth=2, zorder=4,
    )  # fmt: skip
    for place, value, spread in zip(places, means, spreads, strict=True):
        axes.annotate(
            f"{_number(value, tiers.percent)} ± {_number(spread, tiers.percent)}",
            (place, value + spread),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            bbox={"facecolor": COLOURS["paper"], "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
            zorder=5,
        )
    axes.set_xticks(places, tiers.names, color=COLOURS["ink"])
    side = style.fitting(width, 0.3, 0.5)
    axes.set_xlim(-side, places[-1] + side)
    axes.margins(y=0.09)
    axes.set_ylabel(f"{tiers.metric} of a client")
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.0f} %" if tiers.percent else f"{value:g}")
    )
    axes.grid(axis="y")
    return figure


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
def overlap(panels: Sequence[tuple[str, Mapping[str, Any]]], width: float) -> Figure:
    """Mean cos² between the tiers' subspaces, layer by layer, and what random subspaces would have.

    A panel for each run, on one scale: with and without the penalty, where such runs are set side
    by side.
    """
    panels = [(title, content) for title, content in panels if any(_curves(content).values())]
    if width > style.NARROW:
        columns = len(panels)
    else:
        columns = 1
    rows = math.ceil(len(panels) / columns)
    figure, grid = style.new_grid(width, 3.6 * rows, rows, columns)
    top = max(_top(content) for _, content in panels)
    for axes, (title, content) in zip(grid, panels, strict=True):
        _overlap_panel(axes, content, top)
        if len(panels) > 1:
            axes.set_title(title, loc="left", fontsize=9)
    return figure


def _overlap_panel(axes: Axes, content: Mapping[str, Any], top: float) -> None:
    layers = content["layers"]
    named = []
    for pair, rows in _curves(content).items():
        if not rows:
            continue
        title, colour, dash, marker = _PAIRS[pair]
        values = np.array(rows)
        axes.fill_between(
            layers, values.min(0), values.max(0), color=colour, alpha=0.10, linewidth=0
        )
        axes.plot(layers, values.mean(0), color=colour, linestyle=dash, marker=marker, markersize=5)
        named.append((title, float(values.mean(0)[-1]), colour))
    for chance in sorted(set(content.get("chance", {}).values())):
        axes.axhline(chance, color=COLOURS["base"], linewidth=1.4, linestyle=(0, (2, 2)))
        named.append((f"chance {chance:.3f}", chance, COLOURS["muted"]))
    axes.set_ylim(0, top * 1.12 or 1.0)
    for (title, _, colour), place in zip(
        named, style.spread([y for _, y, _ in named], top * 0.085), strict=True
    ):
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
    axes.set_xticks(layers if len(layers) <= 16 else layers[:: math.ceil(len(layers) / 12)])
    axes.margins(x=0.02)
    axes.grid(axis="y")


def _top(content: Mapping[str, Any]) -> float:
    return max(
        [
            *(value for rows in _curves(content).values() for row in rows for value in row),
            *_chances(content),
        ]
    )


def _curves(content: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """By pair of tiers: one row for each cluster or client, one number for each layer."""
    found = content.get("overlap", {})
    return {
        pair: [
            row for row in (rows.values() if isinstance(rows, Mapping) else rows) if row is not None
        ]
        for pair in _PAIRS
        for rows in [found.get(pair, [])]
    }


def _chances(content: Mapping[str, Any]) -> list[float]:
    return list(content.get("chance", {}).values())


def _gammas(run_dir: Path) -> tuple[float, float] | None:
    import tomllib

    try:
        job = tomllib.loads((run_dir / "job.toml").read_text(encoding="utf-8")).get("method", {})
    except (OSError, ValueError):
        return None
    if "gamma_c" in job and "gamma_l" in job:
        return (job["gamma_c"], job["gamma_l"])
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
        texts.append(
            f"This run’s penalties: γ_c = {gammas[0]:g} towards the root, γ_l = {gammas[1]:g} "
            f"between leaf and cluster."
            + (
                ""
                if beside
                else " To see what they do, set a run with both at 0 beside it: fedgrove report "
                "RUN --beside OTHER."
            )
        )
    return "\n\n".join(texts)
