"""grove's growth: planted groups are found, chance is not, and cuts are nested for any input."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from fedgrove.clustering.growth import grow
from fedgrove.ground.errors import AdapterError

Matrix = NDArray[np.float64]


def measured(
    rng: np.random.Generator, groups: list[int], gap: float, noise: float = 1.0
) -> tuple[Matrix, Matrix]:
    """Two noisy measurements of clients whose groups lie ``gap`` apart."""
    centres = rng.normal(size=(max(groups) + 1, 12))
    centres *= gap / np.linalg.norm(centres, axis=1, keepdims=True)
    halves = []
    for _ in range(2):
        points = centres[groups] + noise * rng.normal(size=(len(groups), 12)) / np.sqrt(12)
        halves.append(np.linalg.norm(points[:, None] - points[None], axis=2))
    return halves[0], halves[1]


def test_a_planted_tree_is_found_layer_by_layer() -> None:
    rng = np.random.default_rng(1)
    two, four = [0] * 8 + [1] * 8, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    planted = [[0] * 16, two, two, four, four]
    layers = [measured(rng, groups, 0.0 if max(groups) == 0 else 3.0) for groups in planted]
    cuts = grow([a for a, _ in layers], [b for _, b in layers], level=0.01, most=3)
    assert [each.count for each in cuts] == [1, 2, 2, 4, 4]
    for each, groups in zip(cuts, planted, strict=True):
        assert adjusted_rand_score(groups, each.labels) == 1.0


def test_clients_without_groups_stay_together() -> None:
    """At level .05 a layer of chance splits in about one of twenty cases."""
    split = 0
    for seed in range(40):
        layers = [measured(np.random.default_rng((7, seed)), [0] * 12, 0.0)]
        cuts = grow([a for a, _ in layers], [b for _, b in layers], seed=seed, permutations=39)
        split += cuts[0].count > 1
    assert split <= 6


def test_one_measurement_alone_would_see_groups_in_noise() -> None:
    """Why the evidence is halved: a tree's own groups look real on the noise that made them.

    At level .05 half a case of ten is expected.
    """
    split = 0
    for seed in range(10):
        one, _ = measured(np.random.default_rng((8, seed)), [0] * 12, 0.0)
        split += grow([one], [one], seed=seed, permutations=39)[0].count > 1
    assert split >= 3


def test_cuts_are_nested_and_counts_never_fall() -> None:
    for seed in range(10):
        rng = np.random.default_rng((9, seed))
        layers = [measured(rng, rng.integers(0, 4, 10).tolist(), 2.0) for _ in range(5)]
        cuts = grow([a for a, _ in layers], [b for _, b in layers], seed=seed, permutations=19)
        for above, below in pairwise(cuts):
            assert above.count <= below.count < above.count + 3
            parents = [
                {above.labels[i] for i in np.flatnonzero(below.labels == g)}
                for g in set(below.labels)
            ]
            assert all(len(each) == 1 for each in parents)


def test_permuting_clients_permutes_the_groups() -> None:
    rng = np.random.default_rng(3)
    layers = [measured(rng, [0, 1] * 6, 4.0), measured(rng, [0, 1, 2] * 4, 4.0)]
    order = rng.permutation(12)
    plain = grow([a for a, _ in layers], [b for _, b in layers])
    moved = grow(
        *([half[np.ix_(order, order)] for half in halves] for halves in zip(*layers, strict=True))
    )
    for one, other in zip(plain, moved, strict=True):
        assert one.count == other.count
        assert adjusted_rand_score(one.labels[order], other.labels) == 1.0


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_few_clients_stay_together(clients: int) -> None:
    apart = np.ones((clients, clients)) - np.eye(clients)
    assert [each.count for each in grow([apart], [apart])] == [1]


def test_measurements_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterError, match="1 and 2 layers"):
        grow([np.zeros((4, 4))], [np.zeros((4, 4))] * 2)
