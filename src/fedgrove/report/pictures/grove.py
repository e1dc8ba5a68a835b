"""grove's ``grove.json``: who shares what, layer by layer, and how much of it each client trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedgrove.ground import words
from fedgrove.report.branches import Tree
from fedgrove.report.pictures.tree import grown, table
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import COLOURS

_TRAINED = LinearSegmentedColormap.from_list("trained", ["#f1f1ee", "#8fc1e3", "#00538a"])
_LEFT, _RIGHT, _TOP = 0.75, 1.0, 0.35  # inches beside and above the drawing
_ROW = 0.24  # inches of a module
_NAME = 0.14  # inches that a name needs across
_LONGEST = 22  # characters of a name


@dataclass(frozen=True)
class Budgets:
    """How often each client trained each module of its path; the root's modules come first."""

    root: int
    branch: int
    trained: Mapping[str, Sequence[int]]

    def matrix(self, clients: Sequence[str]) -> NDArray[np.float64]:
        """Trainings [modules, clients], in the order given; 0 where a client never trained."""
        none = [0] * (self.root + self.branch)
        rows = [self.trained.get(name, none) for name in clients]
        return np.array(rows, dtype=np.float64).T


def grove(left: Left) -> list[Section]:
    """The paths, and who trained how much of them; nothing before the groups have grown."""
    if not left.has("grove.json"):
        return []
    content = left.read("grove.json")
    tree = Tree.read(content)
    modules = content["modules"]
    budgets = Budgets(modules["root"], modules["branch"], content["trained"])
    return [
        Section(
            "The paths: who shares with whom, layer by layer",
            paths_story(tree, budgets, content["grown"]),
            partial(grown, tree),
            table(tree),
        ),
        Section(
            "What each client trained of its path",
            budgets_story(budgets),
            partial(trained, tree, budgets),
        ),
    ]


def paths_story(tree: Tree, budgets: Budgets, round: int) -> str:
    """What the first figure shows."""
    deepest = len(tree.layers[-1].groups)
    who = words.count(len(tree.columns), "client")
    groups = words.count(deepest, "group")
    found = (
        f"After round {round} the groups grew from what training had changed: {who}, {groups} in "
        "the deepest layer."
    )
    if all(len(layer.groups) == 1 for layer in tree.layers):
        found = (
            f"After round {round} no split passed the test, so all {who} share every module of "
            "every layer."
        )
    joined = ""
    if tree.joined:
        joined = f" Placed later (*): {words.some(tree.joined, 12)}."
    return (
        f"{found}{joined}\n\nRead it downwards. Every column is a client. In each layer a client "
        f"runs {words.count(budgets.root, 'module')} of the root, which are everybody's, and "
        f"{words.count(budgets.branch, 'module')} of its band. Where a band splits, its clients part "
        "for all deeper layers."
    )


def budgets_story(budgets: Budgets) -> str:
    """What the second figure shows."""
    return (
        "Every row is a module of the path, the root's above the line. Darker: trained in more "
        "rounds. A client of a small budget trains few modules each round and folds the others, so "
        "its column is paler. Clients stand in the order of the paths above."
    )


def trained(tree: Tree, budgets: Budgets, width: float) -> Figure:
    """Modules downwards, clients across, shaded by how often."""
    clients = tree.columns
    values = budgets.matrix(clients)
    tall = min(_ROW, 6.0 / len(values)) * len(values)
    inches = width - _LEFT - _RIGHT
    named = inches / len(clients) >= _NAME
    below = 0.45
    if named:
        longest = max(map(len, clients))
        below = 0.2 + 0.088 * min(longest + 1, _LONGEST)
    height = _TOP + tall + below
    figure = Figure(figsize=(width, height))
    bottom = below / height
    axes = figure.add_axes((_LEFT / width, bottom, inches / width, tall / height))
    most = max(1.0, float(values.max()))
    image = axes.imshow(
        values,
        aspect="auto",
        cmap=_TRAINED,
        vmin=0,
        vmax=most,
    )
    axes.axhline(budgets.root - 0.5, color=COLOURS["ink"], linewidth=1.4)
    axes.spines[:].set_visible(False)
    axes.set_yticks(*_ticks(budgets), fontsize=10)
    axes.tick_params(length=0)
    if named:
        labels = [words.shorten(name, _LONGEST) for name in clients]
        axes.set_xticks(
            range(len(clients)),
            labels,
            rotation=90,
            fontsize=10,
        )
    else:
        axes.set_xticks([])
        axes.set_xlabel(words.count(len(clients), "client"))
    right = 1 - (_RIGHT - 0.15) / width
    key = figure.add_axes((right, bottom, 0.12 / width, tall / height))
    bar = figure.colorbar(image, cax=key, ticks=[0, most])
    rounds = words.count(int(most), "round")
    bar.ax.set_yticklabels(["never", rounds], fontsize=10)
    bar.outline.set_visible(False)
    return figure


def _ticks(budgets: Budgets) -> tuple[list[float], list[str]]:
    """The middle of the root's modules and of the branches', with their names."""
    places, names = [], []
    if budgets.root:
        places.append((budgets.root - 1) / 2)
        names.append("root")
    if budgets.branch:
        places.append(budgets.root + (budgets.branch - 1) / 2)
        names.append("branch")
    return places, names
