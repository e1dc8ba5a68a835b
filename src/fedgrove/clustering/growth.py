"""grove's growth: nested groups layer by layer, split only where the split would not come by chance.

FedTreeLoRA asks a hand-set score ``tau`` whether a layer splits. Here a permutation test does. The
clients' distances are measured twice, on independent evidence (changes of odd and of even rounds:
the noise of minibatches is not the same in both). The tree of one half proposes groups, the other
half judges them, and the other way round; a split stands where the mean of the two silhouettes is
above what it is for shuffled clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.clustering.matrix import checked
from fedgrove.clustering.tree import LayerCut, cut, merge_tree, silhouette
from fedgrove.ground.errors import AdapterError

Matrix = NDArray[np.float64]


def grow(
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    level: float = 0.05,
    most: int = 3,
    permutations: int = 99,
    linkage: str = "average",
    seed: int = 0,
) -> list[LayerCut]:
    """One cut per layer, shallow to deep, each refining the one before; ``score`` is its silhouette.

    Args:
        first, second: the two measurements, per layer [N, N].
        level: of the test, for a whole layer: the best of its candidates is held against the best
            of shuffled clients, so trying several counts costs nothing.
        most: a layer may have up to ``most - 1`` groups more than the layer above it.
        permutations: shuffles of the test; the smallest p it can give is ``1 / (1 + permutations)``.
        linkage: of the merge tree. seed: of the shuffles.

    Fewer than four clients stay together: shuffles of three tell nothing. The groups are cuts of
    the tree of both halves together. Raises AdapterError for measurements that do not fit.
    """
    halves = [[checked(D) for D in half] for half in (first, second)]
    layers, clients = len(halves[0]), _clients(halves)
    whole = merge_tree(np.mean([*halves[0], *halves[1]], axis=0), linkage)
    if clients < 4:
        return [LayerCut(layer, 1, 0.0, cut(whole, 1)) for layer in range(layers)]
    trees = [merge_tree(np.mean(half, axis=0), linkage) for half in halves]
    proposals = [{count: cut(tree, count) for count in range(2, clients)} for tree in trees]
    rng = np.random.default_rng(seed)
    shuffles = [rng.permutation(clients) for _ in range(permutations)]
    cuts: list[LayerCut] = []
    count = 1
    for layer in range(layers):
        judges = [halves[1][layer], halves[0][layer]]  # each half judges what the other proposed
        candidates = range(max(2, count), min(clients, count + most))
        scores = {each: _crossed(proposals, judges, each) for each in candidates}
        score = 0.0
        if scores and _by_chance(proposals, judges, list(scores), shuffles) <= level:
            count = max(scores, key=lambda each: scores[each])
            score = scores[count]
        cuts.append(LayerCut(layer, count, score, cut(whole, count)))
    return cuts


def _clients(halves: Sequence[Sequence[Matrix]]) -> int:
    """N, the same for all matrices of both halves."""
    sizes = {len(matrix) for half in halves for matrix in half}
    if len(halves[0]) != len(halves[1]) or len(sizes) != 1:
        raise AdapterError(
            f"The two measurements have {len(halves[0])} and {len(halves[1])} layers of sizes "
            f"{sorted(sizes)}: give both the same layers and clients."
        )
    return sizes.pop()


def _crossed(
    proposals: Sequence[dict[int, NDArray[np.int64]]], judges: Sequence[Matrix], count: int
) -> float:
    """The mean silhouette of each half's groups on the other half's distances."""
    pairs = zip(proposals, judges, strict=True)
    return float(np.mean([silhouette(proposal[count], judge) for proposal, judge in pairs]))


def _by_chance(
    proposals: Sequence[dict[int, NDArray[np.int64]]],
    judges: Sequence[Matrix],
    counts: Sequence[int],
    shuffles: Sequence[NDArray[np.int64]],
) -> float:
    """The p-value of the best candidate against the best candidate of shuffled clients."""
    found = max(_crossed(proposals, judges, count) for count in counts)
    at_least = 0
    for order in shuffles:
        shuffled = [judge[np.ix_(order, order)] for judge in judges]
        best = max(_crossed(proposals, shuffled, count) for count in counts)
        at_least += best >= found - 1e-12
    return (1 + at_least) / (1 + len(shuffles))
