"""grove's growth: nested groups layer by layer, split only where the split would not come by chance.

FedTreeLoRA asks a hand-set score ``tau`` whether a layer splits. Here a permutation test does. The
clients' distances are measured twice, on independent evidence (changes of odd and of even rounds:
the noise of minibatches is not the same in both). The tree of one half proposes groups, the other
half judges them, and the other way round; a split stands where the mean of the two silhouettes is
above what it is for shuffled clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.clustering.matrix import Labels, Matrix, checked
from fedgrove.clustering.tree import LayerCut, cut, merge_tree, silhouette
from fedgrove.ground.errors import AdapterError

Proposal = dict[int, Labels]  # number of groups -> the groups


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
    odd = [checked(D) for D in first]
    even = [checked(D) for D in second]
    layers = len(odd)
    clients = _clients(odd, even)
    whole = _mean_tree([*odd, *even], linkage)
    if clients < 4:
        return _together(whole, layers)
    proposals = [
        _proposal(odd, linkage),
        _proposal(even, linkage),
    ]
    rng = np.random.default_rng(seed)
    shuffles = [rng.permutation(clients) for _ in range(permutations)]
    cuts: list[LayerCut] = []
    count = 1
    for layer in range(layers):
        judges = [even[layer], odd[layer]]  # each half judges what the other proposed
        least = max(2, count)
        end = min(clients, count + most)
        scores: dict[int, float] = {}
        for each in range(least, end):
            scores[each] = _crossed(proposals, judges, each)
        score = 0.0
        if scores:
            chance = _by_chance(proposals, judges, scores, shuffles)
            if chance <= level:
                count = max(scores, key=scores.__getitem__)
                score = scores[count]
        labels = cut(whole, count)
        chosen = LayerCut(layer, count, score, labels)
        cuts.append(chosen)
    return cuts


def _mean_tree(matrices: Sequence[Matrix], linkage: str) -> Matrix:
    mean = np.mean(matrices, axis=0)
    return merge_tree(mean, linkage)


def _together(whole: Matrix, layers: int) -> list[LayerCut]:
    """One group of all on every layer."""
    cuts: list[LayerCut] = []
    for layer in range(layers):
        labels = cut(whole, 1)
        cuts.append(LayerCut(layer, 1, 0.0, labels))
    return cuts


def _proposal(half: Sequence[Matrix], linkage: str) -> Proposal:
    """The groups that one half's tree has at every count from 2 to N - 1."""
    tree = _mean_tree(half, linkage)
    clients = len(tree) + 1
    proposal: Proposal = {}
    for count in range(2, clients):
        proposal[count] = cut(tree, count)
    return proposal


def _clients(odd: Sequence[Matrix], even: Sequence[Matrix]) -> int:
    """N, the same for all matrices of both halves."""
    sizes = {len(matrix) for matrix in (*odd, *even)}
    layers = len(odd)
    of_second = len(even)
    if layers != of_second or len(sizes) != 1:
        raise AdapterError(
            f"The two measurements have {layers} and {of_second} layers of sizes "
            f"{sorted(sizes)}: give both the same layers and clients."
        )
    return sizes.pop()


def _crossed(
    proposals: Sequence[Proposal],
    judges: Sequence[Matrix],
    count: int,
) -> float:
    """The mean silhouette of each half's groups on the other half's distances."""
    scores: list[float] = []
    for proposal, judge in zip(proposals, judges, strict=True):
        score = silhouette(proposal[count], judge)
        scores.append(score)
    return float(np.mean(scores))


def _by_chance(
    proposals: Sequence[Proposal],
    judges: Sequence[Matrix],
    scores: Mapping[int, float],
    shuffles: Sequence[NDArray[np.int64]],
) -> float:
    """The p-value of the best of the candidates' scores against the best candidate of shuffled
    clients.
    """
    as_good = max(scores.values()) - 1e-12
    at_least = 1  # the clients as they are
    for order in shuffles:
        both = np.ix_(order, order)
        shuffled = [judge[both] for judge in judges]
        by_count = [_crossed(proposals, shuffled, count) for count in scores]
        if max(by_count) >= as_good:
            at_least += 1
    return at_least / (1 + len(shuffles))
