"""What ``tree.json`` says, and where its trunk and branches lie on paper. No drawing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from fedgrove.ground.plain import Given
from fedgrove.report.style import CYCLE

Group = frozenset[str]
Colour = tuple[float, float, float]
Floats = NDArray[np.float64]
Span = tuple[list[int], list[Group], list[float]]

_WOOD = (0.52, 0.49, 0.46)  # what a trunk of many branches fades to
#: all gaps between branches at the deepest layer, as a share of the clients' own width
_SPREAD = 0.45
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
    def read(cls, content: Given) -> Tree:
        layers = []
        for row in content["layers"]:
            groups = [frozenset(group) for group in row["groups"]]
            layers.append(Layer(row["layer"], row["score"], groups))
        return cls(
            clients=content["clients"],
            merges=content["merges"],
            joined=content.get("joined", []),
            layers=layers,
            shares=content.get("lambda") or {},
        )

    @cached_property
    def nested(self) -> bool:
        """Whether no layer brings clients together that the layer above parted (the ablation
        without a tree may).
        """
        for above, below in pairwise(self.layers):
            for fine in below.groups:
                if not any(fine <= coarse for coarse in above.groups):
                    return False
        return True

    @cached_property
    def nodes(self) -> list[list[str]]:
        """The clients below each node, left to right: the leaves, then the merges in order."""
        rank = {name: place for place, name in enumerate(self.clients)}

        def earliest(names: Sequence[str]) -> int:
            return min(rank[name] for name in names)

        found = [[name] for name in self.clients]
        for left, right, *_ in self.merges:
            # The branch with the earliest client stands on the left, whichever of the two scipy
            # names first.
            pair = (found[int(left)], found[int(right)])
            one, other = sorted(pair, key=earliest)
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
            places = [place for place, other in enumerate(order) if other in own]
            order.insert(1 + max(places), name)
        return order

    @cached_property
    def place(self) -> dict[str, int]:
        return {name: column for column, name in enumerate(self.columns)}

    def ordered(self, groups: Sequence[Group]) -> list[Group]:
        """Groups from left to right, by their first column."""

        def first(group: Group) -> int:
            return min(self.place[name] for name in group)

        return sorted(groups, key=first)

    # ---------------------------------------------------------------- what to say
    def spans(self) -> list[Span]:
        """Runs of layers with the same groups: (the layers, the groups, their scores)."""
        found: list[Span] = []
        before: list[Group] = []
        for layer in self.layers:
            if not found or set(before) != set(layer.groups):
                found.append(([], layer.groups, []))
                before = layer.groups
            indices, _, scores = found[-1]
            indices.append(layer.index)
            scores.append(layer.score)
        return found

    # ---------------------------------------------------------------- colours
    @cached_property
    def _twigs(self) -> dict[str, int]:
        """The number of each client's group in the deepest layer."""
        found: dict[str, int] = {}
        deepest = self.ordered(self.layers[-1].groups)
        for number, group in enumerate(deepest):
            found |= dict.fromkeys(group, number)
        return found

    @cached_property
    def _palette(self) -> list[Colour]:
        count = len(self.layers[-1].groups)
        if count <= len(CYCLE):
            return [to_rgb(colour) for colour in CYCLE[:count]]
        turbo = colormaps["turbo"]
        places = [0.05 + 0.9 * number / (count - 1) for number in range(count)]
        return [to_rgb(turbo(place)) for place in places]

    def colour(self, group: Sequence[str] | Group) -> Colour:
        """A group of the deepest layer has a colour of its own; what splits into several is the
        more wood, the more.
        """
        twigs = [self._twigs[name] for name in group]
        wood = 0.8 * (1 - 1 / len(set(twigs)))
        own = np.mean([self._palette[twig] for twig in twigs], axis=0)
        mixed = (1 - wood) * own + wood * np.array(_WOOD)
        red, green, blue = (float(value) for value in mixed)
        return red, green, blue

    # ---------------------------------------------------------------- places
    @cached_property
    def births(self) -> list[int | None]:
        """For each pair of neighbouring columns the first layer, by place, that parts them."""
        if not self.nested:
            return [None] * (len(self.columns) - 1)
        return [self._birth(frozenset(pair)) for pair in pairwise(self.columns)]

    def _birth(self, pair: Group) -> int | None:
        """The first layer that parts two clients."""
        for place, layer in enumerate(self.layers):
            if not any(pair <= group for group in layer.groups):
                return place
        return None

    @cached_property
    def _gaps(self) -> Floats:
        """The width of the gap between neighbouring columns at the deepest layer, in columns: the
        older, the wider.
        """
        depth = len(self.layers)
        ages = np.zeros(len(self.births))
        for place, birth in enumerate(self.births):
            if birth is not None:
                ages[place] = 0.35 + (depth - birth) / depth
        if not ages.any():
            return ages
        count = len(self.columns)
        shared = _SPREAD * count * ages / ages.sum()
        widest = _WIDEST * count * ages + 0.2
        return np.minimum(shared, widest)

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
        opened = []
        for gap, birth in zip(self._gaps, self.births, strict=True):
            share = 0.0
            if birth is not None:
                share = _opening(depth - birth, layers - birth)
            opened.append(gap * share)
        moved = np.concatenate([[0.0], np.cumsum(opened)])
        places = np.arange(len(self.columns)) + moved
        middle = (places[0] + places[-1]) / 2
        return np.asarray(places - middle)

    def lives(self) -> list[tuple[Group, int, int]]:
        """Each group with the first layer that has it and the one after the last, by place."""
        starts: dict[Group, int] = {}
        ends: dict[Group, int] = {}
        for place, layer in enumerate(self.layers):
            for group in layer.groups:
                starts.setdefault(group, place)
                ends[group] = place + 1
        return [(group, start, ends[group]) for group, start in starts.items()]

    def outline(self, group: Group, start: float, end: float) -> Floats:
        """The corners [n, 2] of a branch that is ``group`` from one depth to another."""
        steps = int(12 * (end - start)) + 1
        columns = [self.place[name] for name in group]
        first = min(columns)
        last = max(columns)
        left = []
        right = []
        for depth in np.linspace(start, end, max(3, steps)):
            row = self.centres(depth)
            left.append((row[first] - 0.5, depth))
            right.append((row[last] + 0.5, depth))
        return np.array(left + right[::-1])


def _opening(age: float, whole: float) -> float:
    """How far a gap is open, 0 to 1: smoothly over the first part of its ``whole`` layers, then it
    stays as it is.
    """
    opens = min(whole, max(1.0, 0.7 * whole))
    part = min(max(age, 0.0) / opens, 1.0)
    return part * part * (3 - 2 * part)
