"""FedTreeLoRA and HiLoRA offline, against dense formulas and scikit-learn and scipy used
directly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score
from tests.aggregate.made import (
    SITES,
    Array,
    best,
    close,
    dense,
    draw,
    products,
    read,
    weighted,
    write,
)

from fedgrove.aggregate import aggregate
from fedgrove.ground.errors import AdapterError

LAYERS = {
    0: ["encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value"],
    1: ["encoder.layer.1.attention.self.query"],
    10: ["encoder.layer.10.attention.self.value"],  # not between 1 and 2, as text would have it
}


def planted(root: Path, rank: int = 3) -> tuple[list[Path], list[dict[str, Any]]]:
    """Six clients: alike in layer 0, two groups in layer 1, three in layer 10."""
    common, noise = draw(1, rank), [draw(10 + n, rank) for n in range(6)]
    factors = []
    for n in range(6):
        mine = {}
        for layer, sites in LAYERS.items():
            odd, last = (layer > 0 and n % 2), 0.9 * (layer == 10 and n in (3, 5))
            for site in sites:
                shift, more = np.random.default_rng(layer).normal(size=(2, *common[site][1].shape))
                a, b = common[site][0], common[site][1] / np.linalg.norm(common[site][1])
                wobble = noise[n][site][1] / np.linalg.norm(noise[n][site][1])
                mine[site] = (
                    a + 0.1 * noise[n][site][0],
                    b + odd * shift + last * more + 0.3 * wobble,
                )
        factors.append(mine)
    return [write(root / f"c{n}", each, 6.0) for n, each in enumerate(factors)], factors


def distances(factors: Any, distance: str) -> dict[int, Array]:
    found = {}
    for layer, sites in LAYERS.items():
        each = np.zeros((6, 6))
        for site in sites:
            rows = np.array([one[site][1].ravel() for one in factors])
            if distance == "frobenius":
                each += np.linalg.norm(rows[:, None] - rows[None], axis=2)
            else:
                unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
                each += 1 - unit @ unit.T
        found[layer] = each / len(sites)
        np.fill_diagonal(found[layer], 0)
    return found


@pytest.mark.parametrize(
    ("distance", "link", "wanted_counts"),
    [("frobenius", "average", [1, 2, 3]), ("cosine", "complete", [1, 2, 2])],
)
def test_fedtreelora(distance: str, link: str, wanted_counts: list[int], tmp_path: Path) -> None:
    folders, factors = planted(tmp_path)
    weights = [1.0, 2.0, 3.0, 1.0, 2.0, 5.0]
    options = ["K=2", "tau=0.2", f"distance={distance}", f"linkage={link}"]
    aggregate("fedtreelora", folders, tmp_path / "out", weights="1,2,3,1,2,5", options=options)
    tree = json.loads((tmp_path / "out" / "tree.json").read_text())
    apart = distances(factors, distance)
    merges = linkage(squareform(sum(apart.values()) / 3, checks=False), method=link)
    np.testing.assert_allclose(tree["merges"], merges, rtol=1e-9)
    assert tree["clients"] == [f"c{n}" for n in range(6)]
    assert [layer["layer"] for layer in tree["layers"]] == [0, 1, 10]
    count, counts = 1, []
    for layer in tree["layers"]:
        scores = {}
        for c in range(count, min(6, count + 2)):
            labels = fcluster(merges, c, "maxclust")
            scores[c] = (
                0.2
                if c == 1
                else silhouette_score(apart[layer["layer"]], labels, metric="precomputed")
            )
        count = max(scores, key=lambda c: scores[c])
        counts.append(count)
        assert layer["count"] == count == len(layer["groups"])
        assert layer["score"] == pytest.approx(scores[count])
        labels = fcluster(merges, count, "maxclust")
        wanted = {frozenset(f"c{n}" for n in np.flatnonzero(labels == g)) for g in set(labels)}
        assert {frozenset(group) for group in layer["groups"]} == wanted
        for site in LAYERS[layer["layer"]]:
            for group in layer["groups"]:
                rows = [int(name[1:]) for name in group]
                for name in group:
                    a, b, scale = read(tmp_path / "out" / name)[site]
                    close(
                        a,
                        weighted(
                            [factors[row][site][0] for row in rows], [weights[row] for row in rows]
                        ),
                    )
                    close(
                        b,
                        weighted(
                            [factors[row][site][1] for row in rows], [weights[row] for row in rows]
                        ),
                    )
                    assert scale == 2.0
    assert counts == wanted_counts
    for site, (a, _, _) in read(tmp_path / "out" / "_global").items():
        close(a, weighted([each[site][0] for each in factors], weights))


def test_fedtreelora_with_k_1_is_fedit(tmp_path: Path) -> None:
    folders, _ = planted(tmp_path)
    aggregate("fedtreelora", folders, tmp_path / "tree", options=["K=1"])
    aggregate("fedit", folders, tmp_path / "fedit")
    for n in range(6):
        for site, (a, b, _) in read(tmp_path / "fedit" / "_global").items():
            found = read(tmp_path / "tree" / f"c{n}")[site]
            assert np.array_equal(found[0], a)
            assert np.array_equal(found[1], b)


def test_a_site_outside_the_numbered_layers_is_a_layer_above_them(tmp_path: Path) -> None:
    sites = {
        "encoder.layer.0.query": (6, 4),
        "encoder.layer.2.query": (6, 4),
        "pooler.dense": (5, 4),
    }
    folders = [write(tmp_path / f"c{n}", draw(n, 2, sites), 4.0) for n in range(3)]
    aggregate("fedtreelora", folders, tmp_path / "out", options=["fixed_k=2"])
    tree = json.loads((tmp_path / "out" / "tree.json").read_text())
    assert [(layer["layer"], layer["count"]) for layer in tree["layers"]] == [
        (0, 2),
        (2, 2),
        (3, 2),
    ]


RANKS = [2, 3, 2, 4, 3, 2]
ALPHAS = [4.0, 3.0, 1.0, 8.0, 9.0, 2.0]


def subspaces(root: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Even clients share one column space, odd ones another; ranks and alphas are mixed."""
    factors = []
    for n, rank in enumerate(RANKS):
        each = draw(n, rank)
        for site, (out, _) in SITES.items():
            frame = np.linalg.qr(np.random.default_rng(7 + n % 2).normal(size=(out, out)))[0][
                :, :rank
            ]
            mixing = np.random.default_rng(50 + n).normal(size=(rank, rank))
            each[site] = (
                each[site][0],
                frame @ mixing + 0.02 * each[site][1] / np.linalg.norm(each[site][1]),
            )
        factors.append(each)
    return [write(root / f"c{n}", each, ALPHAS[n]) for n, each in enumerate(factors)], factors


@pytest.mark.parametrize("balanced", [False, True])
def test_hilora(balanced: bool, tmp_path: Path) -> None:
    folders, factors = subspaces(tmp_path)
    order = [3, 0, 1, 2, 5, 4]
    weights = [float(2 + n) for n in range(6)]
    text = ",".join(str(weights[n]) for n in order)
    options = ["k_max=4", f"balanced={str(balanced).lower()}", "seed=3"]
    aggregate(
        "hilora",
        [folders[n] for n in order],
        tmp_path / "out",
        weights=text,
        options=options,
        rank=5,
    )
    found = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert found["clients"] == [f"c{n}" for n in order]
    assert found["labels"] == [0, 1, 0, 1, 0, 1]  # numbered by first appearance in the order given
    apart = np.zeros((6, 6))
    for site in SITES:
        spans = [np.linalg.svd(factors[n][site][1], full_matrices=False)[0] for n in order]
        for i, u in enumerate(spans):
            for j, v in enumerate(spans):
                smaller = min(u.shape[1], v.shape[1])
                apart[i, j] += (i != j) * (1 - np.linalg.norm(u.T @ v) ** 2 / smaller) / len(SITES)
    np.testing.assert_allclose(found["distances"], apart, atol=1e-12)
    sigma = np.median(apart[np.triu_indices(6, 1)])
    assert found["sigma"] == pytest.approx(sigma)
    affinity = np.exp(-(apart**2) / (2 * sigma**2))
    degree = np.diag(affinity.sum(1) ** -0.5)
    np.testing.assert_allclose(
        found["eigenvalues"], np.linalg.eigvalsh(np.eye(6) - degree @ affinity @ degree), atol=1e-10
    )
    for site in SITES:
        each = products(factors, ALPHAS, site)
        close(dense(tmp_path / "out" / "_global")[site], best(weighted(each, weights), 5))
        for n in range(6):
            rows = [m for m in range(6) if m % 2 == n % 2]
            ideal = weighted([each[m] for m in rows], [weights[m] for m in rows])
            a, b, scale = read(tmp_path / "out" / f"c{n}")[site]
            assert (len(a), scale) == (RANKS[n], ALPHAS[n] / RANKS[n])
            close(scale * b @ a, best(ideal, RANKS[n]))
            if not balanced:
                close(b.T @ b, np.eye(RANKS[n]))


def test_two_clients_stay_together(tmp_path: Path) -> None:
    folders, _ = subspaces(tmp_path)
    aggregate("hilora", folders[:2], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "clusters.json").read_text())["labels"] == [0, 0]


@pytest.mark.parametrize("method", ["fedtreelora", "hilora"])
def test_a_weight_of_zero_would_leave_a_group_without_a_mean(method: str, tmp_path: Path) -> None:
    folders, _ = planted(tmp_path)
    with pytest.raises(AdapterError, match="weights above 0"):
        aggregate(method, folders, tmp_path / "out", weights="1,2,3,0,1,1")
