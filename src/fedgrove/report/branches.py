"""What ``tree.json`` says, and where its trunk and branches lie on paper. No drawing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from fedgrove.report.style import CYCLE

Group = frozenset[str]
Colour = tuple[float, float, float]
Floats = NDArray[np.float64]

_WOOD = (0.52, 0.49, 0.46)  # what a trunk of many branches fades to
_SPREAD = (
    0.45  # all gaps between branches at the deepest layer, as a share of the clients' own width
)
_WIDEST = 0.13  # one gap, likewise


@dataclass(frozen=True)
class Layer:
    """One layer's cut; ``score`` is what chose it."""

    index: int
    score: float
    groups: list[Group]


@dataclass(frozen=True)
class Tree:
    """A run's ``tree.json``. ``layers``: shallow to deep; ``shares``: ``{layer: {client: λ}}``, as
    far as known.
    """

    clients: list[str]
    merges: list[list[float]]
    joined: list[str]
    layers: list[Layer]
    shares: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Tree:
        rows = [
            Layer(row["layer"], row["score"], [frozenset(group) for group in row["groups"]])
            for row in content["layers"]
        ]
        return cls(
            content["clients"],
            content["merges"],
            content.get("joined", []),
            rows,
            content.get("lambda") or {},
        )

    @cached_property
    def nested(self) -> bool:
        """Whether no layer brings clients together that the layer above parted (the ablation
        without a tree may).
        """
        return all(
            any(fine <= coarse for coarse in above.groups)
            for above, below in pairwise(self.layers)
            for fine in below.groups
        )

    @cached_property
    def nodes(self) -> list[list[str]]:
        """The clients below each node, left to right: the leaves, then the merges in order."""
        rank = {name: place for place, name in enumerate(self.clients)}
        found = [[name] for name in self.clients]
        for left, right, *_ in self.merges:
            # The branch with the earliest client stands on the left, whichever of the two scipy
            # names first.
            one, other = sorted(
                (found[int(left)], found[int(right)]),
                key=lambda names: min(rank[name] for name in names),
            )
            found.append(one + other)
        return found

    @cached_property
    def columns(self) -> list[str]:
        """Clients from left to right: as the dendrogram has them, a late one beside its group in
        the deepest layer.
        """
        order = list(self.nodes[-1])
        for name in self.joined:
            own = next(group for group in self.layers[-1].groups if name in group)
            order.insert(1 + max(place for place, other in enumerate(order) if other in own), name)
        return order

    @cached_property
    def place(self) -> dict[str, int]:
        return {name: column for column, name in enumerate(self.columns)}

    def ordered(self, groups: Sequence[Group]) -> list[Group]:
        """Groups from left to right, by their first column."""
        return sorted(groups, key=lambda group: min(self.place[name] for name in group))

    # ---------------------------------------------------------------- what to say
    def spans(self) -> list[tuple[list[int], list[Group], list[float]]]:
        """Runs of layers with the same groups: (the layers, the groups, their scores)."""
        found: list[tuple[list[int], list[Group], list[float]]] = []
        for layer in self.layers:
            if found and set(found[-1][1]) == set(layer.groups):
                found[-1][0].append(layer.index)
                found[-1][2].append(layer.score)
            else:
                found.append(([layer.index], layer.groups, [layer.score]))
        return found

    # ---------------------------------------------------------------- colours
    @cached_property
    def _twigs(self) -> dict[str, int]:
        return {
            name: n
            for n, group in enumerate(self.ordered(self.layers[-1].groups))
            for name in group
        }

    @cached_property
    def _palette(self) -> list[Colour]:
        count = len(self.layers[-1].groups)
        if count <= len(CYCLE):
            return [to_rgb(colour) for colour in CYCLE[:count]]
        return [to_rgb(colormaps["turbo"](0.05 + 0.9 * n / (count - 1))) for n in range(count)]

    def colour(self, group: Sequence[str] | Group) -> Colour:
        """A group of the deepest layer has a colour of its own; what splits into several is the
        more wood, the more.
        """
        twigs = [self._twigs[name] for name in group]
        wood = 0.8 * (1 - 1 / len(set(twigs)))
        mixed = (1 - wood) * np.mean(
            [self._palette[twig] for twig in twigs], axis=0
        ) + wood * np.array(_WOOD)
        red, green, blue = (float(value) for value in mixed)
        return red, green, blue

    # ---------------------------------------------------------------- places
    @cached_property
    def births(self) -> list[int | None]:
        """For each pair of neighbouring columns the first layer, by place, that parts them."""
        if not self.nested:
            return [None] * (len(self.columns) - 1)
        found: list[int | None] = []
        for one, other in pairwise(self.columns):
            together = [
                any(one in group and other in group for group in layer.groups)
                for layer in self.layers
            ]
            found.append(together.index(False) if False in together else None)
        return found

    @cached_property
    def _gaps(self) -> Floats:
        """The width of the gap between neighbouring columns at the deepest layer, in columns: the
        older, the wider.
        """
        depth = len(self.layers)
        ages = np.array(
            [0.0 if birth is None else 0.35 + (depth - birth) / depth for birth in self.births]
        )
        if not ages.any():
            return ages
        return np.minimum(
            _SPREAD * len(self.columns) * ages / ages.sum(),
            _WIDEST * len(self.columns) * ages + 0.2,
        )

    @cached_property
    def width(self) -> float:
        """Of everything at the deepest layer, in columns."""
        return len(self.columns) + float(self._gaps.sum())

    def centres(self, depth: float | None = None) -> Floats:
        """The middle of each column at a depth in layers (default: below the deepest), 0 in the
        middle of the page.

        Columns keep their width; the gaps between branches open from where they part: the tree
        spreads downwards.
        """
        layers = len(self.layers)
        if depth is None:
            depth = float(layers)
        else:
            depth = depth
        opened = [
            gap * _opening(depth - birth, layers - birth) if birth is not None else 0.0
            for gap, birth in zip(self._gaps, self.births, strict=True)
        ]
        places = np.arange(len(self.columns)) + np.concatenate([[0.0], np.cumsum(opened)])
        return np.asarray(places - (places[0] + places[-1]) / 2)

    def lives(self) -> list[tuple[Group, int, int]]:
        """Each group with the first layer that has it and the one after the last, by place."""
        found: dict[Group, tuple[int, int]] = {}
        for place, layer in enumerate(self.layers):
            for group in layer.groups:
                found[group] = (found[group][0] if group in found else place, place + 1)
        return [(group, start, end) for group, (start, end) in found.items()]

    def outline(self, group: Group, start: float, end: float) -> Floats:
        """The corners [n, 2] of a branch that is ``group`` from one depth to another."""
        depths = np.linspace(start, end, max(3, int(12 * (end - start)) + 1))
        columns = [self.place[name] for name in group]
        rows = [self.centres(depth) for depth in depths]
        left = [(row[min(columns)] - 0.5, depth) for row, depth in zip(rows, depths, strict=True)]
        right = [(row[max(columns)] + 0.5, depth) for row, depth in zip(rows, depths, strict=True)]
        return np.array(left + right[::-1])


def _opening(age: float, whole: float) -> float:
    """How far a gap is open, 0 to 1: smoothly over the first part of its ``whole`` layers, then it
    stays as it is.
    """
    part = min(max(age, 0.0) / min(whole, max(1.0, 0.7 * whole)), 1.0)
    return part * part * (3 - 2 * part)
