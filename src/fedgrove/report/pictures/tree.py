"""FedTreeLoRA's ``tree.json`` as a tree: one trunk of all clients that splits into branches from
layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from fedgrove.ground import words
from fedgrove.report import style
from fedgrove.report.branches import Group, Tree
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import COLOURS, CYCLE

_STUB = 0.6  # layers' worth of common trunk above the first layer, so that there is a root to see
_LEFT, _RIGHT = (
    0.62,
    {True: 1.15, False: 0.9},
)  # inches beside the drawing, by whether there is room
_NAME = 0.14  # inches that a name needs across
_LONGEST = 22  # characters of a name
_SHARES = LinearSegmentedColormap.from_list(
    "shares", ["#b35900", "#f2c48d", "#f1f1ee", "#8fc1e3", "#00538a"]
)


def tree(left: Left) -> list[Section]:
    """The tree, and how far each client relies on its own branch; nothing before there is a tree."""
    if not left.has("tree.json"):
        return []
    found = Tree.read(left.read("tree.json"))
    sections = [
        Section(
            "The tree: who shares with whom, layer by layer",
            _story(found),
            partial(grown, found),
            table(found),
        )
    ]
    if any(found.shares.get(str(layer.index)) for layer in found.layers if len(layer.groups) > 1):
        text = (
            "λ weighs a client's own branch against the mean of everyone else: 1 is its branch "
            "alone, 0 the others "
            "alone. Each client learns its own, from 0.5, and never sends it.\n\nClients stand in "
            "the order of the "
            "tree above. Where a layer is not split there is nothing to weigh."
        )
        sections.append(
            Section(
                "How far each client relies on its own branch (λ)", text, partial(reliance, found)
            )
        )
    return sections


def grown(tree: Tree, width: float) -> Figure:
    """The dendrogram with the layers' cuts, and under it the branches: layers downwards, clients
    across.
    """
    depth, roomy = len(tree.layers), width > style.NARROW
    row = float(np.clip(4.6 / depth, 0.17, 0.52))
    top = 1.8 if tree.merges else 0.15
    below = _below(tree, width)
    height = top + row * (depth + _STUB) + below
    figure = Figure(figsize=(width, height))
    across = (_LEFT / width, (width - _LEFT - _RIGHT[roomy]) / width)
    axes = figure.add_axes((across[0], below / height, across[1], row * (depth + _STUB) / height))
    axes.set_ylim(depth, -_STUB)
    if tree.nested:
        for group, start, end in [(frozenset(tree.columns), -_STUB, 0.0), *tree.lives()]:
            colour = tree.colour(group)
            axes.add_patch(
                Polygon(
                    tree.outline(group, start, end),
                    closed=True,
                    facecolor=colour,
                    edgecolor=colour,
                    linewidth=0.4,
                )
            )
    else:
        _cells(axes, tree)
    for place in range(depth):
        axes.axhline(place, color=COLOURS["paper"], linewidth=0.7, alpha=0.55)
    _axis(axes, tree, width, row)
    _counts(axes, tree, row)
    if tree.merges:
        dendrogram = figure.add_axes(
            (across[0], 1 - (top - 0.14) / height, across[1], (top - 0.24) / height)
        )
        _dendrogram(dendrogram, tree, top - 0.24, roomy)
    return figure


def reliance(tree: Tree, width: float) -> Figure:
    """λ of each client in each layer."""
    depth, roomy = len(tree.layers), width > style.NARROW
    row = float(np.clip(3.6 / depth, 0.17, 0.36))
    below = _below(tree, width)
    height = 0.45 + row * depth + below
    figure = Figure(figsize=(width, height))
    across = (width - _LEFT - _RIGHT[roomy]) / width
    axes = figure.add_axes((_LEFT / width, below / height, across, row * depth / height))
    axes.set_ylim(depth, 0)
    values = np.full((depth, len(tree.columns)), np.nan)
    for place, layer in enumerate(tree.layers):
        if len(layer.groups) > 1:
            for name, value in tree.shares.get(str(layer.index), {}).items():
                values[place, tree.place[name]] = value
    reach = max(0.05, float(np.ceil(np.nanmax(np.abs(values - 0.5)) * 20) / 20))
    image = None
    for column, centre in enumerate(tree.centres()):
        image = axes.pcolormesh(
            [centre - 0.5, centre + 0.5], np.arange(depth + 1), values[:, column : column + 1],
            cmap=_SHARES, vmin=0.5 - reach, vmax=0.5 + reach, edgecolors=COLOURS["paper"], linewidth=0.6,
        )  # fmt: skip
    _axis(axes, tree, width, row)
    for place, end in _whole(tree):
        axes.axhspan(place, end, color=COLOURS["line"], linewidth=0, alpha=0.45)
        axes.text(
            0,
            (place + end) / 2,
            "shared by all",
            ha="center",
            va="center",
            fontsize=10,
            color=COLOURS["muted"],
        )
    tall = min(1.4, row * depth)
    bar = figure.add_axes(
        (
            1 - (_RIGHT[roomy] - 0.14) / width,
            (below + row * depth - tall) / height,
            0.13 / width,
            tall / height,
        )
    )
    if image is not None:
        figure.colorbar(image, cax=bar, ticks=[0.5 - reach, 0.5, 0.5 + reach]).outline.set_visible(
            False
        )
    key = (
        "blue: more of its own branch   ·   orange: more of the others"
        if roomy
        else "blue: own branch · orange: the others"
    )
    figure.text(_LEFT / width, 1 - 0.27 / height, key, fontsize=10.5, color=COLOURS["muted"])
    return figure


def _cells(axes: Axes, tree: Tree) -> None:
    """Without nesting there are no branches: each layer's groups as cells, with colours that mean
    that row alone.
    """
    centres = tree.centres()
    for place, layer in enumerate(tree.layers):
        for number, group in enumerate(tree.ordered(layer.groups)):
            colour = CYCLE[number % len(CYCLE)] if len(layer.groups) > 1 else COLOURS["base"]
            for name in group:
                column = tree.place[name]
                joined = column + 1 < len(tree.columns) and tree.columns[column + 1] in group
                cell = (centres[column] - 0.46, 1.0 if joined else 0.92)
                axes.broken_barh([cell], (place + 0.07, 0.86), color=colour, linewidth=0)


def _dendrogram(axes: Axes, tree: Tree, inches: float, roomy: bool) -> None:
    columns = tree.centres()
    centres = [float(columns[tree.place[name]]) for name in tree.clients]
    heights = [0.0] * len(tree.clients)
    for number, (left, right, height, *_) in enumerate(tree.merges):
        pair = int(left), int(right)
        for child in pair:
            colour = tree.colour(tree.nodes[child]) if tree.nested else COLOURS["base"]
            axes.plot(
                [centres[child]] * 2,
                [heights[child], height],
                color=colour,
                linewidth=1.8,
                solid_capstyle="butt",
            )
        colour = (
            tree.colour(tree.nodes[len(tree.clients) + number]) if tree.nested else COLOURS["base"]
        )
        axes.plot([centres[child] for child in pair], [height] * 2, color=colour, linewidth=1.8)
        centres.append((centres[pair[0]] + centres[pair[1]]) / 2)
        heights.append(height)
    top = 1.16 * (max(heights) or 1.0)
    axes.set_xlim(-tree.width / 2, tree.width / 2)
    axes.set_ylim(0, top)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylabel("distance", fontsize=10.5)
    if not tree.nested:
        return
    merged, places, labels = heights[len(tree.clients) :], [], []
    for layers, groups, _ in tree.spans():  # where each run of layers cuts the dendrogram
        kept = len(tree.clients) - len(groups)  # merges below the cut
        low, high = (
            merged[kept - 1] if kept > 0 else 0.0,
            merged[kept] if kept < len(merged) else top,
        )
        places.append((low + high) / 2)
        labels.append(_layers(layers) if roomy else _range(layers))
        axes.axhline(
            places[-1], color=COLOURS["muted"], linewidth=1.0, linestyle=(0, (4, 2.5)), zorder=0
        )
    for place, label in zip(style.spread(places, 0.17 * top / inches), labels, strict=True):
        axes.annotate(
            label, (1, place), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=10, color=COLOURS["muted"], va="center", annotation_clip=False,
        )  # fmt: skip


def _axis(axes: Axes, tree: Tree, width: float, row: float) -> None:
    axes.set_xlim(-tree.width / 2, tree.width / 2)
    axes.spines[:].set_visible(False)
    every = 1 if row >= 0.17 else 2
    places = range(0, len(tree.layers), every)
    axes.set_yticks(
        [place + 0.5 for place in places], [str(tree.layers[place].index) for place in places]
    )
    axes.set_ylabel("layer, shallow to deep", fontsize=10.5)
    if not _named(tree, width):
        axes.set_xticks([])
        axes.set_xlabel(f"{len(tree.columns)} clients")
        return
    labels = [_short(name) + ("*" if name in tree.joined else "") for name in tree.columns]
    axes.set_xticks(tree.centres(), labels, rotation=90, fontsize=10, color=COLOURS["ink"])


def _counts(axes: Axes, tree: Tree, row: float) -> None:
    """The number of groups beside each layer, spelt out where it changes."""
    before: list[Group] = []
    for place, layer in enumerate(tree.layers):
        count, new = len(layer.groups), set(layer.groups) != set(before)
        before = layer.groups
        if new or row >= 0.22:
            axes.annotate(
                f"{count} group{'s' if count > 1 else ''}" if new else str(count),
                (1, place + 0.5), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", annotation_clip=False, fontsize=10.5, color=COLOURS["ink" if new else "muted"],
            )  # fmt: skip


def _whole(tree: Tree) -> list[tuple[int, int]]:
    """Runs of layers, by place, that are not split."""
    found: list[tuple[int, int]] = []
    for place, layer in enumerate(tree.layers):
        if len(layer.groups) == 1:
            if found and found[-1][1] == place:
                found[-1] = (found[-1][0], place + 1)
            else:
                found.append((place, place + 1))
    return found


def _below(tree: Tree, width: float) -> float:
    """Inches for what stands under the columns."""
    return (
        0.18 + 0.088 * min(max(map(len, tree.columns)) + 1, _LONGEST)
        if _named(tree, width)
        else 0.4
    )


def _named(tree: Tree, width: float) -> bool:
    return (width - _LEFT - _RIGHT[width > style.NARROW]) / tree.width >= _NAME


def _short(name: str) -> str:
    return words.shorten(name, _LONGEST)


def _range(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {_range(layers)}"


def _story(tree: Tree) -> str:
    count, spans = len(tree.columns), tree.spans()
    trunk = [layers for layers, groups, _ in spans if len(groups) == 1]
    if len(spans) == 1 and trunk:
        found = f"No layer splits: all {count} clients share everything."
    else:
        found = (
            f"All {count} clients share {_layers(trunk[0])}. "
            if trunk
            else "No layer is shared by all clients. "
        )
        found += f"The deepest layer has {len(spans[-1][1])} groups."
    if tree.joined:
        found += f" Joined after the tree was built (*): {words.some(tree.joined, 12)}."
    if tree.nested:
        how = (
            "Read it downwards. Every column is a client. A band is a group of clients that share "
            "one adapter in that "
            "layer; where it splits, they part for all deeper layers. Above it is the merge tree "
            "of the clients, from "
            "the distances between their B, with a dashed line where each layer cuts it."
        )
    else:
        how = (
            "Every column is a client. In each row, clients of one colour share one adapter; every "
            "layer was clustered "
            "alone here, so that groups may cross from row to row. Above is the merge tree over "
            "all layers, unused."
        )
    return f"{found}\n\n{how}"


def table(tree: Tree) -> list[list[str]]:
    """Who shares which layers, a row for each run of layers with the same groups."""
    rows = [["who shares", "layers", "groups", "score"]]
    for layers, groups, scores in tree.spans():
        who = (
            "everyone"
            if len(groups) == 1
            else " · ".join(_members(tree, group) for group in tree.ordered(groups))
        )
        low, high = f"{min(scores):.2f}", f"{max(scores):.2f}"
        rows.append(
            [who, _range(layers), str(len(groups)), low if low == high else f"{low} to {high}"]
        )
    return rows


def _members(tree: Tree, group: Group) -> str:
    names = sorted(group, key=tree.place.__getitem__)
    if len(names) <= 5:
        return ", ".join(names)
    return words.some(names, 3)
