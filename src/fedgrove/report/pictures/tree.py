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
from fedgrove.report.branches import Colour, Floats, Group, Tree
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import COLOURS, CYCLE

_STUB = 0.6  # layers' worth of common trunk above the first layer, so that there is a root to see
_LEFT = 0.62  # inches beside the drawing
_RIGHT = {True: 1.15, False: 0.9}  # likewise, by whether there is room
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
    split = [layer for layer in found.layers if len(layer.groups) > 1]
    if any(found.shares.get(str(layer.index)) for layer in split):
        title = "How far each client relies on its own branch (λ)"
        text = (
            "λ weighs a client's own branch against the mean of everyone else: 1 is its branch "
            "alone, 0 the others "
            "alone. Each client learns its own, from 0.5, and never sends it.\n\nClients stand in "
            "the order of the "
            "tree above. Where a layer is not split there is nothing to weigh."
        )
        sections.append(Section(title, text, partial(reliance, found)))
    return sections


def grown(tree: Tree, width: float) -> Figure:
    """The dendrogram with the layers' cuts, and under it the branches: layers downwards, clients
    across.
    """
    depth = len(tree.layers)
    roomy = width > style.NARROW
    row = float(np.clip(4.6 / depth, 0.17, 0.52))
    top = 0.15
    if tree.merges:
        top = 1.8
    below = _below(tree, width)
    tall = row * (depth + _STUB)
    height = top + tall + below
    figure = Figure(figsize=(width, height))
    left = _LEFT / width
    across = (width - _LEFT - _RIGHT[roomy]) / width
    axes = figure.add_axes((left, below / height, across, tall / height))
    axes.set_ylim(depth, -_STUB)
    if tree.nested:
        _branches(axes, tree)
    else:
        _cells(axes, tree)
    for place in range(depth):
        axes.axhline(
            place,
            color=COLOURS["paper"],
            linewidth=0.7,
            alpha=0.55,
        )
    _axis(axes, tree, width, row)
    _counts(axes, tree, row)
    if tree.merges:
        bottom = 1 - (top - 0.14) / height
        inches = top - 0.24
        dendrogram = figure.add_axes((left, bottom, across, inches / height))
        _dendrogram(dendrogram, tree)
        if tree.nested:
            _cuts(dendrogram, tree, inches, roomy)
    return figure


def _branches(axes: Axes, tree: Tree) -> None:
    """The trunk above the first layer, and every group from where it begins to where it splits."""
    trunk = (frozenset(tree.columns), -_STUB, 0.0)
    for group, start, end in [trunk, *tree.lives()]:
        colour = tree.colour(group)
        branch = Polygon(
            tree.outline(group, start, end),
            closed=True,
            facecolor=colour,
            edgecolor=colour,
            linewidth=0.4,
        )
        axes.add_patch(branch)


def reliance(tree: Tree, width: float) -> Figure:
    """λ of each client in each layer."""
    depth = len(tree.layers)
    roomy = width > style.NARROW
    row = float(np.clip(3.6 / depth, 0.17, 0.36))
    below = _below(tree, width)
    height = 0.45 + row * depth + below
    figure = Figure(figsize=(width, height))
    left = _LEFT / width
    across = (width - _LEFT - _RIGHT[roomy]) / width
    axes = figure.add_axes((left, below / height, across, row * depth / height))
    axes.set_ylim(depth, 0)
    values = _reliances(tree)
    farthest = np.nanmax(np.abs(values - 0.5))
    reach = max(0.05, float(np.ceil(farthest * 20) / 20))
    ends = (0.5 - reach, 0.5 + reach)
    image = None
    for column, centre in enumerate(tree.centres()):
        image = axes.pcolormesh(
            [centre - 0.5, centre + 0.5],
            np.arange(depth + 1),
            values[:, column : column + 1],
            cmap=_SHARES,
            vmin=ends[0],
            vmax=ends[1],
            edgecolors=COLOURS["paper"],
            linewidth=0.6,
        )
    _axis(axes, tree, width, row)
    _shared_layers(axes, tree)
    tall = min(1.4, row * depth)
    place = (
        1 - (_RIGHT[roomy] - 0.14) / width,
        (below + row * depth - tall) / height,
        0.13 / width,
        tall / height,
    )
    bar = figure.add_axes(place)
    if image is not None:
        scale = figure.colorbar(
            image,
            cax=bar,
            ticks=[ends[0], 0.5, ends[1]],
        )
        scale.outline.set_visible(False)
    key = style.fitting(
        width,
        "blue: more of its own branch   ·   orange: more of the others",
        "blue: own branch · orange: the others",
    )
    figure.text(
        left,
        1 - 0.27 / height,
        key,
        fontsize=10.5,
        color=COLOURS["muted"],
    )
    return figure


def _reliances(tree: Tree) -> Floats:
    """λ [layers, columns]; NaN where a layer is not split, or none is known."""
    values = np.full((len(tree.layers), len(tree.columns)), np.nan)
    for place, layer in enumerate(tree.layers):
        if len(layer.groups) > 1:
            shares = tree.shares.get(str(layer.index), {})
            for name, value in shares.items():
                values[place, tree.place[name]] = value
    return values


def _shared_layers(axes: Axes, tree: Tree) -> None:
    for place, end in _whole(tree):
        axes.axhspan(
            place,
            end,
            color=COLOURS["line"],
            linewidth=0,
            alpha=0.45,
        )
        axes.text(
            0,
            (place + end) / 2,
            "shared by all",
            ha="center",
            va="center",
            fontsize=10,
            color=COLOURS["muted"],
        )


def _cells(axes: Axes, tree: Tree) -> None:
    """Without nesting there are no branches: each layer's groups as cells, with colours that mean
    that row alone.
    """
    centres = tree.centres()
    for place, layer in enumerate(tree.layers):
        for number, group in enumerate(tree.ordered(layer.groups)):
            colour = COLOURS["base"]
            if len(layer.groups) > 1:
                colour = CYCLE[number % len(CYCLE)]
            for name in group:
                column = tree.place[name]
                others = tree.columns[column + 1 :]
                across = 0.92
                if others and others[0] in group:
                    across = 1.0
                cell = (centres[column] - 0.46, across)
                axes.broken_barh(
                    [cell],
                    (place + 0.07, 0.86),
                    color=colour,
                    linewidth=0,
                )


def _dendrogram(axes: Axes, tree: Tree) -> None:
    columns = tree.centres()
    centres = [float(columns[tree.place[name]]) for name in tree.clients]
    heights = [0.0] * len(tree.clients)
    for left, right, height, *_ in tree.merges:
        pair = int(left), int(right)
        for child in pair:
            axes.plot(
                [centres[child]] * 2,
                [heights[child], height],
                color=_node_colour(tree, child),
                linewidth=1.8,
                solid_capstyle="butt",
            )
        ends = [centres[child] for child in pair]
        colour = _node_colour(tree, len(centres))
        axes.plot(
            ends,
            [height] * 2,
            color=colour,
            linewidth=1.8,
        )
        centres.append(sum(ends) / 2)
        heights.append(height)
    axes.set_xlim(-tree.width / 2, tree.width / 2)
    axes.set_ylim(0, _dendrogram_top(tree))
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylabel("distance", fontsize=10.5)


def _node_colour(tree: Tree, node: int) -> Colour | str:
    if tree.nested:
        return tree.colour(tree.nodes[node])
    return COLOURS["base"]


def _dendrogram_top(tree: Tree) -> float:
    highest = max(merge[2] for merge in tree.merges)
    return 1.16 * (max(0.0, highest) or 1.0)


def _cuts(axes: Axes, tree: Tree, inches: float, roomy: bool) -> None:
    """Where each run of layers cuts the dendrogram, which is ``inches`` high."""
    top = _dendrogram_top(tree)
    levels = [0.0, *(merge[2] for merge in tree.merges), top]
    places = []
    labels = []
    for layers, groups, _ in tree.spans():
        kept = len(tree.clients) - len(groups)  # merges below the cut
        place = (levels[kept] + levels[kept + 1]) / 2
        label = _range(layers)
        if roomy:
            label = _layers(layers)
        places.append(place)
        labels.append(label)
        axes.axhline(
            place,
            color=COLOURS["muted"],
            linewidth=1.0,
            linestyle=(0, (4, 2.5)),
            zorder=0,
        )
    apart = style.spread(places, 0.17 * top / inches)
    for place, label in zip(apart, labels, strict=True):
        _beside(
            axes,
            place,
            label,
            fontsize=10,
            color=COLOURS["muted"],
        )


def _beside(
    axes: Axes,
    place: float,
    text: str,
    *,
    fontsize: float,
    color: str,
) -> None:
    """Words right of the axes at a height."""
    axes.annotate(
        text,
        (1, place),
        (8, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        annotation_clip=False,
        fontsize=fontsize,
        color=color,
    )


def _axis(axes: Axes, tree: Tree, width: float, row: float) -> None:
    axes.set_xlim(-tree.width / 2, tree.width / 2)
    axes.spines[:].set_visible(False)
    every = 1
    if row < 0.17:
        every = 2
    places = range(0, len(tree.layers), every)
    middles = [place + 0.5 for place in places]
    layers = [str(tree.layers[place].index) for place in places]
    axes.set_yticks(middles, layers)
    axes.set_ylabel("layer, shallow to deep", fontsize=10.5)
    if not _named(tree, width):
        axes.set_xticks([])
        axes.set_xlabel(f"{len(tree.columns)} clients")
        return
    labels = [_label(tree, name) for name in tree.columns]
    axes.set_xticks(
        tree.centres(),
        labels,
        rotation=90,
        fontsize=10,
        color=COLOURS["ink"],
    )


def _label(tree: Tree, name: str) -> str:
    """A column's name, with a star where the client joined later."""
    short = words.shorten(name, _LONGEST)
    if name in tree.joined:
        return short + "*"
    return short


def _counts(axes: Axes, tree: Tree, row: float) -> None:
    """The number of groups beside each layer, spelt out where it changes."""
    before: list[Group] = []
    for place, layer in enumerate(tree.layers):
        count = len(layer.groups)
        new = set(layer.groups) != set(before)
        before = layer.groups
        middle = place + 0.5
        if new:
            text = words.count(count, "group")
            _beside(
                axes,
                middle,
                text,
                fontsize=10.5,
                color=COLOURS["ink"],
            )
        elif row >= 0.22:
            _beside(
                axes,
                middle,
                str(count),
                fontsize=10.5,
                color=COLOURS["muted"],
            )


def _whole(tree: Tree) -> list[tuple[int, int]]:
    """Runs of layers, by place, that are not split."""
    found: list[tuple[int, int]] = []
    for place, layer in enumerate(tree.layers):
        if len(layer.groups) > 1:
            continue
        start = place
        if found and found[-1][1] == place:
            start, _ = found.pop()
        found.append((start, place + 1))
    return found


def _below(tree: Tree, width: float) -> float:
    """Inches for what stands under the columns."""
    if not _named(tree, width):
        return 0.4
    longest = max(map(len, tree.columns))
    return 0.18 + 0.088 * min(longest + 1, _LONGEST)


def _named(tree: Tree, width: float) -> bool:
    roomy = width > style.NARROW
    inches = width - _LEFT - _RIGHT[roomy]
    return inches / tree.width >= _NAME


def _range(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return str(layers[0])
    return f"{layers[0]}–{layers[-1]}"


def _layers(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {_range(layers)}"
    return f"layers {_range(layers)}"


def _story(tree: Tree) -> str:
    count = len(tree.columns)
    spans = tree.spans()
    trunk = [layers for layers, groups, _ in spans if len(groups) == 1]
    deepest = len(tree.layers[-1].groups)
    if len(spans) == 1 and trunk:
        found = f"No layer splits: all {count} clients share everything."
    elif trunk:
        found = f"All {count} clients share {_layers(trunk[0])}. "
        found += f"The deepest layer has {deepest} groups."
    else:
        found = "No layer is shared by all clients. "
        found += f"The deepest layer has {deepest} groups."
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
        who = "everyone"
        if len(groups) > 1:
            who = " · ".join(_members(tree, group) for group in tree.ordered(groups))
        low = f"{min(scores):.2f}"
        high = f"{max(scores):.2f}"
        score = low
        if low != high:
            score = f"{low} to {high}"
        rows.append([who, _range(layers), str(len(groups)), score])
    return rows


def _members(tree: Tree, group: Group) -> str:
    names = sorted(group, key=tree.place.__getitem__)
    if len(names) <= 5:
        return ", ".join(names)
    return words.some(names, 3)
