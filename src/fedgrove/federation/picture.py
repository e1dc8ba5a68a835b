"""A picture of who holds what: training examples by client and label."""

from __future__ import annotations

import warnings
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedgrove.ground.plain import Plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe & Ito's palette, told apart with any kind of colour vision; neighbours also differ in
#: lightness
COLOURS = ("#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#F0E442", "#CC79A7", "#5F5F5F")
MOST_BARS = 100
MOST_NAMES, MOST_LABELS = 40, 80  # written out along a heat map
INK, PALE = "#333333", "#DDDDDD"
GAP = 0.8  # between groups, in bars


def who_holds_what(table: Plain, target: Path | BytesIO) -> None:
    """Draw ``Federation.table()`` as a PNG: a bar for each client, stacked by label (or kind),
    under its natural group.

    More than 100 clients or 8 labels become a heat map (client across, label down, share of its
    examples) under the clients' sizes; past 40 clients it is ordered by main label instead of name.
    Held-out clients are marked.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    clients = sorted(table["clients"], key=lambda client: (_group(client), client["name"]))
    labels, what = table["labels"], "label"
    if table.get("kinds") and all("kinds" in client for client in clients):
        labels, what = table["kinds"], table["kind"]
        clients = [{**client, "labels": client["kinds"]} for client in clients]
    if not any(client["labels"] for client in clients):
        # sites of a deployment may keep these counts to themselves
        labels = ["any label"]
        clients = [{**client, "labels": {"any label": client["train"]}} for client in clients]
    many = len(clients) > MOST_BARS or len(labels) > len(COLOURS)
    figure = Figure(facecolor="white")
    if many:
        _heat(figure, clients, labels, what)
    else:
        _bars(figure, clients, labels)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # "$" in a label is a dollar
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a script that the font lacks shows as boxes
        figure.savefig(
            target,
            format="png",
            dpi=144,
            metadata={"Software": None},
        )


def _bars(
    figure: Figure,
    clients: list[Plain],
    labels: list[str],
) -> None:
    places, heads, end = _rows_by_group(clients)
    height = 0.21 * end + 1.25
    figure.set_size_inches(7.6, height)
    axes = figure.add_axes((0.2, 0.62 / height, 0.75, 1 - 1.25 / height))
    totals = _stacked(axes, places, clients, labels)
    most = float(totals.max())
    for place, client, total in zip(places, clients, totals, strict=True):
        note = f"{int(total)}"
        if client["held_out"]:
            note += "  held out"
        axes.text(
            total + 0.01 * most,
            place,
            note,
            va="center_baseline",
            fontsize=7.5,
            color=INK,
        )
    for place, group in heads:
        axes.text(
            0,
            place,
            short(group, 40),
            va="center",
            fontsize=9,
            fontweight="bold",
            color=INK,
        )
    names = [short(client["name"], 22) for client in clients]
    axes.set_yticks(places, names, fontsize=7.5)
    if heads:
        end -= GAP
    axes.set_ylim(max(end, 1) - 0.4, -0.6)
    axes.set_xlim(0, 1.13 * most)
    _example_axis(axes)
    _key(figure, labels, 1 - 0.08 / height)


def _rows_by_group(
    clients: list[Plain],
) -> tuple[list[float], list[tuple[float, str]], float]:
    """Where the clients' bars stand, where the groups' names do, and where the last one ends; in
    bars. No names where no client has a group.
    """
    grouped = any(client["group"] for client in clients)
    places: list[float] = []
    heads: list[tuple[float, str]] = []
    at = 0.0
    for group, members in groupby(clients, key=_group):
        if grouped:
            heads.append((at, group or "no group"))
            at += 1
        for _ in members:
            places.append(at)
            at += 1
        if grouped:
            at += GAP
    return places, heads, at


def _stacked(
    axes: Axes,
    places: list[float],
    clients: list[Plain],
    labels: list[str],
) -> np.ndarray:
    """Draws a part of each bar for each label, paler where a client is held out; the bars' sums."""
    start = np.zeros(len(clients))
    for number, label in enumerate(labels):
        counts = np.array([client["labels"].get(label, 0) for client in clients])
        colours: list[tuple[str, float]] = []
        for client in clients:
            if client["held_out"]:
                colours.append((COLOURS[number], 0.4))
            else:
                colours.append((COLOURS[number], 1.0))
        axes.barh(
            places,
            counts,
            0.78,
            left=start,
            color=colours,
            linewidth=0,
        )
        start += counts
    return start


def _example_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training examples", fontsize=9, color=INK)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    _plain(axes)


def _key(
    figure: Figure,
    labels: list[str],
    top: float,
) -> None:
    """Which colour is which label."""
    from matplotlib.patches import Patch

    patches = []
    for colour, label in zip(COLOURS, labels, strict=False):
        patches.append(Patch(color=colour, label=short(label, 24)))
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=(0.19, top),
        ncols=4,
        frameon=False,
        fontsize=8.5,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )


def _heat(
    figure: Figure,
    clients: list[Plain],
    labels: list[str],
    what: str,
) -> None:
    named = len(clients) <= MOST_NAMES
    below = 1.6
    if not named:
        clients = sorted(clients, key=_by_main_label)
        below = 0.7
    rows = [[client["labels"].get(label, 0) for label in labels] for client in clients]
    counts = np.array(rows, float)
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]

    map_height = max(1.2, 0.17 * min(len(labels), MOST_LABELS))
    height = below + map_height + 2.1
    figure.set_size_inches(9.0, height)
    left, width = 0.2, 0.71
    bottom, tall = below / height, map_height / height
    above = (below + map_height + 0.45) / height
    sizes = figure.add_axes((left, above, width, 1.15 / height))
    heat = figure.add_axes((left, bottom, width, tall))
    for axes in (sizes, heat):
        _plain(axes)
    _sizes(sizes, clients, totals)
    image = heat.imshow(
        shares.T,
        aspect="auto",
        interpolation="nearest",
        cmap="PuBu",
        vmin=0,
    )
    _names(heat, clients, labels, what)
    bar = figure.add_axes((left + width + 0.015, bottom, 0.012, tall))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    _group_names(heat, clients, named)


def _sizes(
    axes: Axes,
    clients: list[Plain],
    totals: np.ndarray,
) -> None:
    """How much each client has, as one outline: a bar each takes minutes for thousands."""
    edges = np.arange(len(clients) + 1) - 0.5
    away = np.array([client["held_out"] for client in clients])
    for colour, shown in ((COLOURS[0], ~away), (COLOURS[1], away)):
        axes.stairs(
            np.where(shown, totals, 0),
            edges,
            fill=True,
            color=colour,
            linewidth=0,
        )
    held_out = int(away.sum())
    title = f"training examples of {len(clients)} clients"
    if held_out:
        title += f" ({held_out} held out: orange)"
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xlim(-0.5, len(clients) - 0.5)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xticks([])


def _names(
    axes: Axes,
    clients: list[Plain],
    labels: list[str],
    what: str,
) -> None:
    """What the rows and columns of the heat map are; clients where their names have room."""
    axes.set_title(
        f"share of each {what}",
        fontsize=9,
        color=INK,
        loc="left",
    )
    step = -(-len(labels) // MOST_LABELS)
    axes.set_yticks(
        range(0, len(labels), step),
        [short(label, 22) for label in labels[::step]],
        fontsize=8,
    )
    names: list[str] = []
    if len(clients) <= MOST_NAMES:
        names = [short(client["name"], 16) for client in clients]
    axes.set_xticks(
        range(len(names)),
        names,
        fontsize=7.5,
        rotation=90,
    )


def _group_names(
    axes: Axes,
    clients: list[Plain],
    named: bool,
) -> None:
    """Lines between groups and their names, below those of the clients where these are written."""
    drop = -6
    if named:
        drop = -72
    at = 0
    for group, members in groupby(clients, key=_group):
        size = len(list(members))
        if at:
            axes.axvline(at - 0.5, color=INK, linewidth=1)
        middle = at + (size - 1) / 2
        if group:
            axes.annotate(
                short(group, 18),
                (middle, 0),
                (0, drop),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8.5,
            )
        at += size


def _group(client: Plain) -> str:
    return client["group"] or ""


def _by_main_label(client: Plain) -> tuple[str, int, float, str]:
    counts = list(client["labels"].values())
    main = int(np.argmax(counts))
    share = counts[main] / max(1, sum(counts))
    return _group(client), main, -share, client["name"]


def _plain(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.set_axisbelow(True)


def short(text: str, length: int) -> str:
    """The text, or its start and an ellipsis: at most ``length`` characters."""
    if len(text) <= length:
        return text
    return text[: length - 1] + "…"
