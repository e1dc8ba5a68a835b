"""The merge tree, its cuts and the depth search against slow re-implementations of methods.md
A1.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgrove.clustering import tree
from fedgrove.ground.errors import AdapterError

Matrix = NDArray[np.float64]


def random_distances(seed: int, clients: int) -> Matrix:
    """Distinct, and no metric at all: nothing here may rely on the triangle inequality."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(0.1, 2.0, (clients, clients)), 1)
    return upper + upper.T


def planted(seed: int, groups: list[int], gap: float = 10.0) -> Matrix:
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 0.5, (len(groups), 4))
    points[:, 0] += gap * np.array(groups)
    return np.asarray(np.linalg.norm(points[:, None] - points[None], axis=2))


def groups_of(labels: NDArray[np.int64]) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == g).tolist()) for g in np.unique(labels)}


def slow_cut(D: Matrix, count: int, between: Callable[[Matrix], float]) -> set[frozenset[int]]:
    groups = [frozenset([i]) for i in range(len(D))]
    while len(groups) > count:
        pairs = [(a, b) for n, a in enumerate(groups) for b in groups[n + 1 :]]
        a, b = min(pairs, key=lambda pair: between(D[np.ix_(sorted(pair[0]), sorted(pair[1]))]))
        groups = [g for g in groups if g not in (a, b)] + [a | b]
    return set(groups)


def slow_silhouette(labels: NDArray[np.int64], D: Matrix) -> float:
    scores = []
    for i, own in enumerate(labels):
        mates = [j for j in range(len(D)) if labels[j] == own and j != i]
        if not mates:
            scores.append(0.0)
            continue
        inside = np.mean([D[i, j] for j in mates])
        outside = min(np.mean(D[i, labels == g]) for g in set(labels.tolist()) - {own})
        scores.append((outside - inside) / max(inside, outside))
    return float(np.mean(scores))


def slow_search(
    D: Matrix, layers: list[Matrix], tau: float, K: int
) -> list[tuple[int, set[frozenset[int]]]]:
    clients, previous, result = len(D), 1, []
    for layer in layers:
        best, best_score = None, -np.inf
        for c in range(previous, min(clients, previous + K)):
            groups = slow_cut(D, c, lambda block: float(block.mean()))
            labels = np.zeros(clients, dtype=np.int64)
            for number, group in enumerate(groups):
                labels[list(group)] = number
            score = tau if c == 1 else slow_silhouette(labels, layer)
            if score > best_score:
                best, best_score, chosen = c, score, groups
        assert best is not None
        previous = best
        result.append((best, chosen))
    return result


@pytest.mark.parametrize(
    ("linkage", "between"), [("average", np.mean), ("complete", np.max), ("single", np.min)]
)
@pytest.mark.parametrize("seed", range(4))
def test_every_cut_is_greedy_agglomeration(
    linkage: str, between: Callable[[Matrix], float], seed: int
) -> None:
    D = random_distances(seed, 9)
    Z = tree.merge_tree(D, linkage)
    assert Z.shape == (8, 4)
    for count in range(1, 10):
        labels = tree.cut(Z, count)
        assert groups_of(labels) == slow_cut(D, count, between)
        firsts = [int(np.flatnonzero(labels == g)[0]) for g in range(count)]
        assert firsts == sorted(firsts)


def test_a_cut_has_exactly_its_count_among_equal_heights() -> None:
    Z = tree.merge_tree(np.ones((6, 6)) - np.eye(6))
    cuts = [tree.cut(Z, count) for count in range(1, 7)]
    assert [len(set(labels.tolist())) for labels in cuts] == [1, 2, 3, 4, 5, 6]
    for coarse, fine in pairwise(cuts):
        assert all(len(set(coarse[fine == g].tolist())) == 1 for g in range(int(fine.max()) + 1))


def test_one_and_two_clients() -> None:
    one = tree.merge_tree(np.zeros((1, 1)))
    assert one.shape == (0, 4)
    assert tree.cut(one, 1).tolist() == [0]
    two = np.array([[0.0, 3.0], [3.0, 0.0]])
    for matrix in (np.zeros((1, 1)), two):
        Z = tree.merge_tree(matrix)
        cuts = tree.layer_cuts(Z, [matrix, matrix], tau=-1.0, K=5)
        assert [(each.count, each.score, set(each.labels.tolist())) for each in cuts] == [
            (1, -1.0, {0})
        ] * 2
        assert [each.count for each in tree.untied_cuts([matrix], tau=-1.0)] == [1]
        assert [each.count for each in tree.layer_cuts(Z, [matrix], tau=0.1, K=1, fixed=4)] == [1]
        assert tree.descend(Z, cuts, np.ones(len(matrix))) == [0, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=3, max_size=12))
def test_silhouette(seed: int, groups: list[int]) -> None:
    D, labels = random_distances(seed, len(groups)), np.array(groups)
    if len(set(groups)) < 2:
        with pytest.raises(AdapterError, match="single group"):
            tree.silhouette(labels, D)
    else:
        assert tree.silhouette(labels, D) == pytest.approx(slow_silhouette(labels, D), abs=1e-12)


def test_silhouette_of_singletons_is_zero() -> None:
    assert tree.silhouette([0, 1, 2], random_distances(0, 3)) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clients=st.integers(1, 9),
    layers=st.integers(1, 6),
    tau=st.floats(-0.5, 0.6),
    K=st.integers(1, 4),
)
def test_the_depth_search_is_the_papers_and_is_nested(
    seed: int, clients: int, layers: int, tau: float, K: int
) -> None:
    per_layer = [random_distances(seed + n, clients) for n in range(layers)]
    D = np.mean(per_layer, axis=0)
    cuts = tree.layer_cuts(tree.merge_tree(D), per_layer, tau, K)
    assert [each.layer for each in cuts] == list(range(layers))
    if clients > 1:
        assert [(each.count, groups_of(each.labels)) for each in cuts] == slow_search(
            D, per_layer, tau, K
        )
    previous, limit = np.zeros(clients, dtype=np.int64), 1
    for each, matrix in zip(cuts, per_layer, strict=True):
        assert each.count == len(groups_of(each.labels))
        assert limit <= each.count <= min(max(1, clients - 1), limit + K - 1)
        assert all(len(set(previous[each.labels == g].tolist())) == 1 for g in range(each.count))
        want = tau if each.count == 1 else slow_silhouette(each.labels, matrix)
        assert each.score == pytest.approx(want, abs=1e-12)
        previous, limit = each.labels, each.count


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(8)))
def test_permuting_the_clients_permutes_the_result(seed: int, order: list[int]) -> None:
    per_layer = [random_distances(seed + n, 8) for n in range(4)]
    moved = [matrix[np.ix_(order, order)] for matrix in per_layer]
    newcomer = np.random.default_rng(seed).uniform(0.1, 2.0, 8)
    results = []
    for matrices, to in ((per_layer, newcomer), (moved, newcomer[order])):
        Z = tree.merge_tree(np.mean(matrices, axis=0))
        cuts = tree.layer_cuts(Z, matrices, tau=0.0, K=3)
        results.append((cuts, tree.descend(Z, cuts, to), tree.untied_cuts(matrices, tau=0.0)))
    (cuts, joined, untied), (cuts2, joined2, untied2) = results
    for left, right in [*zip(cuts, cuts2, strict=True), *zip(untied, untied2, strict=True)]:
        assert left.count == right.count
        assert left.score == pytest.approx(right.score, abs=1e-12)
        back = {frozenset(order[i] for i in group) for group in groups_of(right.labels)}
        assert back == groups_of(left.labels)
    for left, right, g, g2 in zip(cuts, cuts2, joined, joined2, strict=True):
        assert {order[i] for i in np.flatnonzero(right.labels == g2)} == set(
            np.flatnonzero(left.labels == g).tolist()
        )


def test_planted_groups_appear_layer_by_layer() -> None:
    """Shallow layers see no groups, middle ones two, deep ones four: the trunk, then the
    branches.
    """
    two, four = [0, 0, 0, 0, 1, 1, 1, 1, 0, 1], [0, 0, 1, 1, 4, 4, 5, 5, 0, 4]
    layers = [
        planted(1, [0] * 10),
        planted(2, two),
        planted(3, two),
        planted(4, four),
        planted(5, four),
    ]
    Z = tree.merge_tree(np.mean(layers, axis=0))
    cuts = tree.layer_cuts(Z, layers, tau=0.5, K=3)
    assert [each.count for each in cuts] == [1, 2, 2, 4, 4]
    assert groups_of(cuts[2].labels) == groups_of(np.array(two))
    assert groups_of(cuts[4].labels) == groups_of(np.array(four))
    assert min(each.score for each in cuts[1:]) > 0.7


def test_tau_and_k_decide_whether_and_how_fast_to_split() -> None:
    groups = [0, 0, 1, 1, 2, 2, 3, 3]
    D = planted(0, groups)
    Z = tree.merge_tree(D)

    def counts(tau: float, K: int) -> list[int]:
        return [each.count for each in tree.layer_cuts(Z, [D] * 4, tau, K)]

    assert counts(0.1, 1) == [1, 1, 1, 1]
    assert counts(0.999, 4) == [1, 1, 1, 1]
    assert counts(-2.0, 4) == [4, 4, 4, 4]
    assert counts(-2.0, 2)[0] == 2


def test_ties_go_to_the_smaller_count() -> None:
    D = np.ones((5, 5)) - np.eye(5)  # every silhouette is 0
    Z = tree.merge_tree(D)
    assert [each.count for each in tree.layer_cuts(Z, [D, D], tau=0.0, K=3)] == [1, 1]
    assert [each.count for each in tree.layer_cuts(Z, [D, D], tau=-1.0, K=3)] == [2, 2]


def test_a_fixed_count_is_the_same_on_every_layer() -> None:
    layers = [random_distances(n, 6) for n in range(3)]
    Z = tree.merge_tree(np.mean(layers, axis=0))
    for fixed, count in ((1, 1), (3, 3), (5, 5), (6, 5), (60, 5)):
        cuts = tree.layer_cuts(Z, layers, tau=0.1, K=1, fixed=fixed)
        assert [each.count for each in cuts] == [count] * 3
        for each, matrix in zip(cuts, layers, strict=True):
            assert each.labels.tolist() == tree.cut(Z, count).tolist()
            want = 0.1 if count == 1 else slow_silhouette(each.labels, matrix)
            assert each.score == pytest.approx(want, abs=1e-12)


def test_untied_layers_follow_their_own_groups() -> None:
    first, second = [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]
    cuts = tree.untied_cuts([planted(1, first), planted(2, second)], tau=0.1)
    assert [each.labels.tolist() for each in cuts] == [first, second]
    assert [each.count for each in tree.untied_cuts([planted(1, first)], tau=0.999)] == [1]


def test_untied_search_takes_the_best_of_all_counts() -> None:
    D = random_distances(3, 7)
    (got,) = tree.untied_cuts([D], tau=-5.0, linkage="complete")
    Z = tree.merge_tree(D, "complete")
    scores = {c: slow_silhouette(tree.cut(Z, c), D) for c in range(2, 7)}
    assert got.score == pytest.approx(max(scores.values()))
    assert scores[got.count] == pytest.approx(got.score)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 10))
def test_a_newcomer_joins_nested_groups_and_a_twin_joins_its_twins(seed: int, clients: int) -> None:
    layers = [random_distances(seed + n, clients) for n in range(5)]
    Z = tree.merge_tree(np.mean(layers, axis=0))
    cuts = tree.layer_cuts(Z, layers, tau=-1.0, K=3)
    to = np.random.default_rng(seed).uniform(0, 1, clients)
    joined = tree.descend(Z, cuts, to)
    for (coarse, g), (fine, h) in pairwise(zip(cuts, joined, strict=True)):
        assert set(np.flatnonzero(fine.labels == h)) <= set(np.flatnonzero(coarse.labels == g))


def test_descent_goes_to_the_nearer_branch_on_average() -> None:
    groups = [0, 1, 0, 1, 0, 1]
    layers = [planted(0, [0] * 6), planted(1, groups), planted(2, groups)]
    Z = tree.merge_tree(np.mean(layers, axis=0))
    cuts = tree.layer_cuts(Z, layers, tau=0.5, K=2)
    assert [each.count for each in cuts] == [1, 2, 2]
    # Nearest to client 0 alone, but nearer to the other group on average: average linkage goes by
    # the mean.
    to = np.array([1.0, 3.0, 9.0, 3.0, 9.0, 3.0])
    assert tree.descend(Z, cuts, to) == [0, 1, 1]
    assert tree.descend(Z, cuts, np.array([2.0, 8.0, 2.0, 8.0, 2.0, 8.0])) == [0, 0, 0]
    assert tree.nearest(cuts[1].labels, to) == 1
    assert tree.nearest([0, 1, 1, 2], [5.0, 1.0, 8.0, 4.4]) == 2
    assert tree.nearest([0, 1], [2.0, 2.0]) == 0


def bad(change: Callable[[Matrix], None]) -> Matrix:
    D = random_distances(0, 4)
    change(D)
    return D


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (np.ones((3, 4)), "shape"),
        (np.zeros((0, 0)), "shape"),
        (bad(lambda D: D.__setitem__((0, 1), np.nan)), "not finite"),
        (bad(lambda D: D.__setitem__((0, 1), 9.0)), "symmetric"),
        (bad(lambda D: D.__setitem__((2, 2), 1.0)), "diagonal"),
        (-random_distances(0, 4), "not negative"),
    ],
)
def test_bad_distances(matrix: Matrix, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        tree.merge_tree(matrix)


def test_bad_arguments() -> None:
    D = random_distances(0, 4)
    Z = tree.merge_tree(D)
    with pytest.raises(AdapterError, match="'ward'"):
        tree.merge_tree(D, "ward")
    for count in (0, 5):
        with pytest.raises(AdapterError, match=r"1\.\.4"):
            tree.cut(Z, count)
    with pytest.raises(AdapterError, match="K is 0"):
        tree.layer_cuts(Z, [D], 0.1, 0)
    with pytest.raises(AdapterError, match="at least 1"):
        tree.layer_cuts(Z, [D], 0.1, 1, fixed=0)
    with pytest.raises(AdapterError, match="Layer 1"):
        tree.layer_cuts(Z, [D, random_distances(0, 5)], 0.1, 2)
    with pytest.raises(AdapterError, match="3 labels"):
        tree.silhouette([0, 1, 0], D)
    with pytest.raises(AdapterError, match="4 finite"):
        tree.descend(Z, [], [1.0, 2.0, 3.0])
