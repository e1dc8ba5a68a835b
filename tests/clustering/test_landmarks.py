"""Landmarks and sketches: what one client's descent gives, and on planted groups what all pairs
give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from fedgrove.adapters.adapter import Site
from fedgrove.adapters.distance import Distance, between, roughly
from fedgrove.adapters.subspace import basis, principal_angle_distances, rough_angles
from fedgrove.clustering import landmarks as module
from fedgrove.clustering.landmarks import joined, landmarks
from fedgrove.clustering.tree import LayerCut, descend, leaves, merge_tree, nearest
from fedgrove.methods.fedtreelora import GroupMeans, TreeOptions
from fedgrove.methods.hilora import ClusterMeans, HiLoRAOptions
from fedgrove.methods.rule import Round

OUT, RANK = 48, 4
SITES = {f"s{number}": Site(f"s{number}", number // 2, OUT, OUT) for number in range(4)}


def planted(clients: int, groups: int, noise: float, seed: int = 0) -> list[list[Tensor]]:
    """B [out, rank] by site and client; client n is of group n % groups."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in SITES:
        centres = torch.randn(groups, OUT, RANK, generator=draw)
        own = torch.randn(clients, OUT, RANK, generator=draw)
        both = centres[torch.arange(clients) % groups] + noise * own
        found.append(list(both))
    return found


def points(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3))


def plain_leaf(Z: np.ndarray, row: np.ndarray) -> int:
    """The descent of one client, written out: the closer branch, ties to the earlier client's."""

    def below(node: int) -> list[int]:
        if node <= len(Z):
            return [node]
        left, right = Z[node - len(Z) - 1, :2]
        return below(int(left)) + below(int(right))

    node = 2 * len(Z)
    while node > len(Z):
        branches = [int(child) for child in Z[node - len(Z) - 1, :2]]
        node = min(branches, key=lambda child: (row[below(child)].mean(), min(below(child))))
    return node


def test_few_clients_are_all_landmarks_and_more_are_drawn_alike() -> None:
    assert landmarks(module.EXACT).tolist() == list(range(module.EXACT))
    some = landmarks(module.EXACT + 1)
    assert len(set(some.tolist())) == module.LANDMARKS
    assert some.tolist() == sorted(landmarks(module.EXACT + 1).tolist())
    assert some.max() > module.EXACT * 0.9


@pytest.mark.parametrize("seed", range(5))
def test_all_come_to_the_leaf_and_the_group_that_each_alone_comes_to(seed: int) -> None:
    known, more = points(30, seed), points(40, seed + 100)
    tree = merge_tree(cdist(known, known))
    apart = cdist(more, known)
    own = [LayerCut(0, 30, 0.0, np.arange(30))]
    wanted = [plain_leaf(tree, row) for row in apart]
    assert leaves(tree, apart).tolist() == wanted
    assert [descend(tree, own, row)[0] for row in apart] == wanted
    labels = np.arange(30) % 4
    assert joined(labels, apart).tolist() == [nearest(labels, row) for row in apart]


def test_a_tree_of_one_has_one_leaf() -> None:
    assert leaves(merge_tree([[0.0]]), np.ones((3, 1))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("distance", ["frobenius", "cosine"])
def test_projections_keep_distances(distance: Distance) -> None:
    clients = [*planted(80, 4, 0.5)[0], torch.zeros(OUT, RANK)]
    exact = between([{"s0": B} for B in clients], {"s0": SITES["s0"]}, distance)[0]
    chosen = list(range(0, 80, 3))
    rough = roughly(clients, chosen, distance, "s0").double()
    wanted = exact[:, chosen]
    off = wanted > 0.1
    error = (rough[off] / wanted[off]).square() - 1
    if distance == "cosine":  # a square already
        error = rough[off] / wanted[off] - 1
    assert abs(float(error.mean())) < 0.05
    assert float(error.square().mean()) ** 0.5 < 2 * (2 / 256) ** 0.5
    if distance == "cosine":
        assert rough[80].eq(1).all()


def test_sketches_of_subspaces_keep_their_angles() -> None:
    draw = torch.Generator().manual_seed(1)
    clients = planted(60, 3, 0.4)[0]
    clients += [B[:, :2] @ torch.randn(2, 2, generator=draw) for B in clients[:10]]
    clients.append(torch.zeros(OUT, RANK))
    exact = principal_angle_distances([basis(B.double()) for B in clients[:-1]])
    several = [rough_angles(clients, range(70), str(number)).double() for number in range(20)]
    mean = torch.stack(several).mean(0)
    assert float((mean[:-1] - exact).abs().mean()) < 0.02
    assert float((several[0][:-1] - exact).square().mean()) ** 0.5 < 0.1
    assert several[0][-1].eq(1).all(), "nothing in common with anybody"


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT", 400)
    monkeypatch.setattr(module, "LANDMARKS", 200)


def grown(options: TreeOptions, clients: Sequence[Sequence[Tensor]]) -> GroupMeans:
    rule = GroupMeans(options, Round(SITES))
    for site, own in zip(SITES.values(), clients, strict=True):
        rule.see(site, own)
    return rule


@pytest.mark.parametrize("options", [{}, {"distance": "cosine"}], ids=["frobenius", "cosine"])
def test_the_tree_of_a_thousand_by_landmarks_is_that_of_all_pairs(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = planted(1000, 5, 0.8)
    chosen = TreeOptions.model_validate({"K": 6, "tau": 0.0, **options})
    whole = grown(chosen, clients).grown
    few(monkeypatch)
    rule = grown(chosen, clients)
    assert len(rule.grown.merges) == 199
    for layer, labels in rule.grown.labels.items():
        assert adjusted_rand_score(whole.labels[layer], labels) >= 0.95
        assert adjusted_rand_score(np.arange(1000) % 5, labels) >= 0.95
    names = [f"c{number}" for number in range(1000)]
    content = rule.artefacts(names)["tree.json"]
    assert len(content["clients"]) == 200
    assert sorted([*content["clients"], *content["joined"]]) == sorted(names)
    assert sum(len(group) for group in content["layers"][0]["groups"]) == 1000


def test_layers_without_a_common_tree_find_planted_groups_by_landmarks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The exact search over a thousand counts takes minutes, so only the planted groups judge."""
    few(monkeypatch)
    monkeypatch.setattr(module, "LANDMARKS", 60)
    rule = grown(TreeOptions(tree=False, tau=0.0), planted(1000, 5, 0.8))
    for labels in rule.grown.labels.values():
        assert adjusted_rand_score(np.arange(1000) % 5, labels) >= 0.95


def test_clusters_of_a_thousand_by_landmarks_are_those_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients = planted(1000, 5, 0.6)

    def found() -> ClusterMeans:
        rule = ClusterMeans(HiLoRAOptions(), Round(SITES))
        for own in clients:
            rule.see(own)
        return rule

    whole = found().labels
    few(monkeypatch)
    rule = found()
    assert rule.distances is not None
    assert rule.distances.shape == (200, 200)
    assert adjusted_rand_score(whole, rule.labels) >= 0.95
    assert adjusted_rand_score(np.arange(1000) % 5, rule.labels) >= 0.95
    content = rule.artefacts([f"c{number}" for number in range(1000)])["clusters.json"]
    assert len(content["placed"]) == 800
