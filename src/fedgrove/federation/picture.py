"""A picture of who holds what: training examples by client and label."""

from __future__ import annotations

import warnings
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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


def who_holds_what(table: dict[str, Any], target: Path | BytesIO) -> None:
    """Draw ``Federation.table()`` as a PNG: a bar for each client, stacked by label (or kind),
    under its natural group.

    More than 100 clients or 8 labels become a heat map (client across, label down, share of its
    examples) under the clients' sizes; past 40 clients it is ordered by main label instead of name.
    Held-out clients are marked.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    clients = sorted(table["clients"], key=lambda client: (client["group"] or "", client["name"]))
    labels, what = table["labels"], "label"
    if table.get("kinds") and all("kinds" in client for client in clients):
        labels, what = table["kinds"], table["kind"]
        clients = [{**client, "labels": client["kinds"]} for client in clients]
    if not any(
        client["labels"] for client in clients
    ):  # sites of a deployment may keep these counts to themselves
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
    clients: list[dict[str, Any]],
    labels: list[str],
) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    grouped = any(client["group"] for client in clients)
    places: list[float] = []
    heads: list[tuple[float, str]] = []
    at = 0.0
    for group, members in groupby(clients, key=lambda client: client["group"] or ""):
        if grouped:
            heads.append((at, group or "no group"))
            at += 1
        for _ in members:
            places.append(at)
            at += 1
        at += GAP if grouped else 0.0
    height = 0.21 * at + 1.25
    figure.set_size_inches(7.6, height)
    axes = figure.add_axes((0.2, 0.62 / height, 0.75, 1 - 1.25 / height))
    start = np.zeros(len(clients))
    for number, label in enumerate(labels):
        counts = np.array([client["labels"].get(label, 0) for client in clients])
        colours = [(COLOURS[number], 0.4 if client["held_out"] else 1.0) for client in clients]
        axes.barh(places, counts, 0.78, left=start, color=colours, linewidth=0)
        start += counts
    most = float(start.max())
    for place, client, total in zip(places, clients, start, strict=True):
        note = f"{int(total)}" + ("  held out" if client["held_out"] else "")
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
    axes.set_yticks(places, [short(client["name"], 22) for client in clients], fontsize=7.5)
    axes.set_ylim(max(at - (GAP if grouped else 0.0), 1) - 0.4, -0.6)
    axes.set_xlim(0, 1.13 * most)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training examples", fontsize=9, color=INK)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color=PALE, linewidth=0.6)
    _plain(axes)
    figure.legend(
        handles=[Patch(color=COLOURS[i], label=short(label, 24)) for i, label in enumerate(labels)],
        loc="upper left",
        bbox_to_anchor=(0.19, 1 - 0.08 / height),
        ncols=4,
        frameon=False,
        fontsize=8.5,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )


def _heat(
    figure: Figure,
    clients: list[dict[str, Any]],
    labels: list[str],
    what: str,
) -> None:
    named = len(clients) <= MOST_NAMES
    if not named:
        clients = sorted(clients, key=_by_main_label)
    counts = np.array(
        [[client["labels"].get(label, 0) for label in labels] for client in clients],
        float,
    )
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]

    below, map_height = (1.6 if named else 0.7), max(1.2, 0.17 * min(len(labels), MOST_LABELS))
    height = below + map_height + 2.1
    figure.set_size_inches(9.0, height)
    left, width = 0.2, 0.71
    sizes = figure.add_axes((left, (below + map_height + 0.45) / height, width, 1.15 / height))
    heat = figure.add_axes((left, below / height, width, map_height / height))
    for axes in (sizes, heat):
        _plain(axes)

    edges = np.arange(len(clients) + 1) - 0.5  # one outline: a bar each takes minutes for thousands
    away = np.array([client["held_out"] for client in clients])
    for colour, shown in ((COLOURS[0], ~away), (COLOURS[1], away)):
        sizes.stairs(
            np.where(shown, totals, 0),
            edges,
            fill=True,
            color=colour,
            linewidth=0,
        )
    held_out = int(away.sum())
    title = f"training examples of {len(clients)} clients" + (
        f" ({held_out} held out: orange)" if held_out else ""
    )
    sizes.set_title(title, fontsize=9, color=INK, loc="left")
    sizes.set_xlim(-0.5, len(clients) - 0.5)
    sizes.tick_params(axis="y", labelsize=8)
    sizes.set_xticks([])

    image = heat.imshow(
        shares.T,
        aspect="auto",
        interpolation="nearest",
        cmap="PuBu",
        vmin=0,
    )
    heat.set_title(
        f"share of each {what}",
        fontsize=9,
        color=INK,
        loc="left",
    )
    step = -(-len(labels) // MOST_LABELS)
    heat.set_yticks(
        range(0, len(labels), step),
        [short(label, 22) for label in labels[::step]],
        fontsize=8,
    )
    names = [short(client["name"], 16) for client in clients] if named else []
    heat.set_xticks(range(len(names)), names, fontsize=7.5, rotation=90)
    bar = figure.add_axes((left + width + 0.015, below / height, 0.012, map_height / height))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)

    at = 0
    for group, members in groupby(clients, key=lambda client: client["group"] or ""):
        size = len(list(members))
        if at:
            heat.axvline(at - 0.5, color=INK, linewidth=1)
        middle = at + (size - 1) / 2
        if group:
            heat.annotate(
                short(group, 18),
                (middle, 0),
                (0, -72 if named else -6),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8.5,
            )
        at += size


def _by_main_label(client: dict[str, Any]) -> tuple[Any, ...]:
    counts = list(client["labels"].values())
    main = int(np.argmax(counts))
    return client["group"] or "", main, -counts[main] / max(1, sum(counts)), client["name"]


def _plain(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.set_axisbelow(True)


def short(text: str, length: int) -> str:
    """The text, or its start and an ellipsis: at most ``length`` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"
