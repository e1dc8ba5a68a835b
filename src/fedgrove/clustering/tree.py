"""FedTreeLoRA's merge tree of clients and its nested cuts, layer by layer (arXiv 2603.13282)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.clustering.matrix import Labels, Matrix, checked, renumbered
from fedgrove.ground.errors import AdapterError

#: Linkages that mean something for any distance ("ward" and its kin need Euclidean points).
LINKAGES = ("average", "complete", "single", "weighted")

#: Two scores closer than this are a tie: they differ by rounding alone.
_TIE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class LayerCut:
    """The groups of one layer: ``count`` of them, ``labels`` int64 [N]; ``score`` is what the
    choice maximised.
    """

    layer: int
    count: int
    score: float
    labels: Labels


def merge_tree(D: ArrayLike, linkage: str = "average") -> Matrix:
    """Agglomerative merge tree of the clients: scipy linkage rows [N - 1, 4], in order of height
    ([0, 4] for N = 1).
    """
    from scipy.cluster.hierarchy import linkage as merge
    from scipy.spatial.distance import squareform

    if linkage not in LINKAGES:
        known = ", ".join(LINKAGES)
        raise AdapterError(f"Linkage '{linkage}' is unknown: use one of {known}.")
    matrix = checked(D)
    if len(matrix) == 1:
        return np.empty((0, 4))
    pairs = squareform(matrix)
    merges = merge(pairs, method=linkage)
    return np.asarray(merges, dtype=np.float64)


def cut(Z: Matrix, count: int) -> Labels:
    """The labels of exactly ``count`` groups: the first ``N - count`` merges of the tree, even
    among equal heights.

    Cuts of one tree are nested: a larger count only splits groups. AdapterError unless ``1 <= count
    <= N``.
    """
    clients = len(Z) + 1
    if not 1 <= count <= clients:
        raise AdapterError(
            f"{clients} clients cannot be cut into {count} groups: use 1..{clients}."
        )
    labels = np.arange(clients)
    merged = members_of(Z)[clients:]
    steps = clients - count
    for step, members in enumerate(merged[:steps]):
        labels[members] = clients + step
    return renumbered(labels)


def silhouette(labels: ArrayLike, D: ArrayLike) -> float:
    """Mean silhouette of a grouping of the clients, in [-1, 1]; clients alone in their group score
    0.

    As scikit-learn defines it (N groups of one score 0 rather than fail), by one matrix product: a
    depth search asks for it hundreds of times. AdapterError for a single group, where it is
    undefined.
    """
    matrix = checked(D)
    clients = len(matrix)
    groups = renumbered(np.asarray(labels))
    found = len(groups)
    if found != clients:
        raise AdapterError(f"{found} labels for {clients} clients: give one label for each.")
    count = int(groups.max()) + 1
    if count < 2:
        raise AdapterError("The silhouette of a single group is undefined: cut into at least 2.")
    return _silhouette(groups, matrix)


def layer_cuts(
    Z: Matrix,
    layer_distances: Sequence[ArrayLike],
    tau: float,
    K: int,
    fixed: int | None = None,
) -> list[LayerCut]:
    """The depth search: one cut of the global tree per layer, shallow to deep, each refining the
    one before.

    ``c_0 = 1``; layer ``l`` takes ``argmax phi`` over ``c_{l-1} <= c < min(N, c_{l-1} + K)``, ties
    to the smaller;
    ``phi(1) = tau``, else ``phi(c)`` is the silhouette of the tree's cut into ``c`` on the layer's
    own distances.

    Args:
        Z: the global tree, from ``merge_tree``.
        layer_distances: per layer, [N, N].
        tau: the score of not splitting. K: the most a layer may add to the count, plus one; 1 never
            splits.
        fixed: the same count on all layers instead of a search (the paper's ablation), at most N -
            1.

    One or two clients always stay together. AdapterError for K < 1, fixed < 1 or matrices of
    another size.
    """
    clients = len(Z) + 1
    too_low = fixed is not None and fixed < 1
    if K < 1 or too_low:
        raise AdapterError(f"K is {K} and the fixed count {fixed}: both must be at least 1.")
    cuts: list[LayerCut] = []
    count = 1
    for layer, distances in enumerate(layer_distances):
        matrix = _sized(distances, clients, layer)
        if fixed is None:
            # At least one candidate: a single client, where no c < N exists, is one group.
            end = max(count + 1, min(clients, count + K))
            candidates = range(count, end)
        else:
            only = min(fixed, max(1, clients - 1))
            candidates = range(only, only + 1)
        best = _best(
            layer,
            Z,
            matrix,
            candidates,
            tau,
        )
        cuts.append(best)
        count = best.count
    return cuts


def untied_cuts(
    layer_distances: Sequence[ArrayLike],
    tau: float,
    linkage: str = "average",
) -> list[LayerCut]:
    """The ablation without the global tree: every layer clustered alone, on a merge tree of its own
    distances.

    Each layer searches all counts ``1 <= c < N`` by the same score; nothing is nested.
    """
    cuts: list[LayerCut] = []
    for layer, distances in enumerate(layer_distances):
        matrix = checked(distances)
        tree = merge_tree(matrix, linkage)
        candidates = range(1, max(2, len(matrix)))
        best = _best(
            layer,
            tree,
            matrix,
            candidates,
            tau,
        )
        cuts.append(best)
    return cuts


def descend(
    Z: Matrix,
    cuts: Sequence[LayerCut],
    distances: ArrayLike,
) -> list[int]:
    """The group that a newcomer joins on each layer: nested, because all lie on one path from the
    root.

    Args:
        Z: the global tree. cuts: its cuts, from ``layer_cuts``.
        distances: from the newcomer to each of the N clients, measured as the tree's own distances
            were.
    """
    to = _row(distances, len(Z) + 1)
    (node,) = leaves(Z, to[None])
    joined: list[int] = []
    for each in cuts:
        group = each.labels[node]
        joined.append(int(group))
    return joined


def leaves(Z: Matrix, distances: ArrayLike) -> NDArray[np.int64]:
    """The leaf of the tree that each client comes to.

    Args:
        Z: the tree of M clients, from ``merge_tree``. distances: [n, M] from others to them.

    At every split one takes the branch whose members are closer on average, ties to the branch that
    holds the earlier client.
    """
    apart = np.asarray(distances)
    count = len(Z) + 1
    members = members_of(Z)
    found = np.zeros(len(apart), dtype=np.int64)
    waiting = [(len(members) - 1, np.arange(len(apart)))]
    while waiting:
        node, rows = waiting.pop()
        if node < count:
            found[rows] = node
            continue
        children = [int(child) for child in Z[node - count, :2]]
        first, second = sorted(children, key=lambda child: int(members[child].min()))
        to_first = apart[np.ix_(rows, members[first])].mean(1)
        to_second = apart[np.ix_(rows, members[second])].mean(1)
        closer = to_first <= to_second
        for child, own in ((first, rows[closer]), (second, rows[~closer])):
            if len(own):
                waiting.append((child, own))
    return found


def nearest(labels: ArrayLike, distances: ArrayLike) -> int:
    """The group whose members are closest to a newcomer on average (for cuts that share no tree);
    ties to the lower.
    """
    groups = np.asarray(labels)
    to = _row(distances, len(groups))
    count = int(groups.max()) + 1
    means = []
    for group in range(count):
        members = groups == group
        means.append(to[members].mean())
    return int(np.argmin(means))


def _best(
    layer: int,
    Z: Matrix,
    matrix: Matrix,
    candidates: Iterable[int],
    tau: float,
) -> LayerCut:
    best: LayerCut | None = None
    for count in candidates:
        labels = cut(Z, count)
        if count == 1:
            score = tau
        else:
            score = _silhouette(labels, matrix)
        if best is None or score > best.score + _TIE:
            best = LayerCut(
                layer,
                count,
                float(score),
                labels,
            )
    assert best is not None
    return best


def _silhouette(
    groups: Labels,
    matrix: Matrix,
) -> float:
    """Of at least two groups numbered from 0, on a checked matrix."""
    count = int(groups.max()) + 1
    clients = np.arange(len(groups))
    member = np.zeros((len(groups), count))
    member[clients, groups] = 1.0
    sizes = member.sum(0)
    sums = matrix @ member
    of_own = sizes[groups]
    others = np.maximum(of_own - 1, 1)
    own = sums[clients, groups] / others  # without itself, at distance 0
    means = sums / sizes
    means[clients, groups] = np.inf
    other = means.min(1)
    widest = np.maximum(own, other)
    defined = (widest > 0) & (of_own > 1)
    scores = np.divide(
        other - own,
        widest,
        out=np.zeros_like(own),
        where=defined,
    )
    return float(scores.mean())


def members_of(Z: Matrix) -> list[NDArray[np.int64]]:
    """The clients below each node: the N leaves, then the merges in order, the root last."""
    members: list[NDArray[np.int64]] = []
    for client in range(len(Z) + 1):
        leaf = np.array([client], dtype=np.int64)
        members.append(leaf)
    children = Z[:, :2].astype(int)
    for left, right in children:
        both = [members[left], members[right]]
        members.append(np.concatenate(both))
    return members


def _sized(
    distances: ArrayLike,
    clients: int,
    layer: int,
) -> Matrix:
    matrix = checked(distances)
    found = len(matrix)
    if found != clients:
        raise AdapterError(f"Layer {layer} has distances for {found} clients, the tree {clients}.")
    return matrix


def _row(distances: ArrayLike, clients: int) -> Matrix:
    row = np.asarray(distances, dtype=np.float64)
    sized = row.shape == (clients,)
    finite = np.isfinite(row)
    if not (sized and finite.all()):
        found = list(row.shape)
        raise AdapterError(
            f"A newcomer needs {clients} finite distances, one to each client: got {found}."
        )
    return row
