import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgrove.clustering.spectral import match, spectral
from fedgrove.ground.errors import AdapterError

Matrix = NDArray[np.float64]


def random_distances(seed: int, clients: int) -> Matrix:
    upper = np.triu(np.random.default_rng(seed).uniform(0.1, 1.0, (clients, clients)), 1)
    return upper + upper.T


def planted(seed: int, groups: list[int], inside: float = 0.1, outside: float = 0.8) -> Matrix:
    """Distances of subspaces: small within a group, large between groups, jittered."""
    own = np.equal.outer(groups, groups)
    return random_distances(seed, len(groups)) * 0.05 + np.where(own, inside, outside) * (
        1 - np.eye(len(groups))
    )


def slow_eigenvalues(D: Matrix) -> tuple[float, Matrix]:
    n = len(D)
    sigma = float(np.median([D[i, j] for i in range(n) for j in range(n) if i != j]))
    W = np.array([[math.exp(-(D[i, j] ** 2) / (2 * sigma**2)) for j in range(n)] for i in range(n)])
    L = np.array(
        [
            [float(i == j) - W[i, j] / math.sqrt(W[i].sum() * W[j].sum()) for j in range(n)]
            for i in range(n)
        ]
    )
    return sigma, np.sort(np.linalg.eigvalsh(L))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    clients=st.integers(3, 14),
    k_min=st.integers(1, 3),
    k_max=st.integers(3, 12),
)
def test_bandwidth_eigenvalues_and_eigengap(
    seed: int, clients: int, k_min: int, k_max: int
) -> None:
    D = random_distances(seed, clients)
    sigma, values = slow_eigenvalues(D)
    got = spectral(D, k_min, k_max)
    assert got.sigma == pytest.approx(sigma, rel=1e-12)
    np.testing.assert_allclose(got.eigenvalues, values, atol=1e-10)
    most = min(k_max, clients - 1)
    gaps = {k: values[k] - values[k - 1] for k in range(min(k_min, most), most + 1)}
    assert got.k == max(gaps, key=lambda k: gaps[k])
    assert got.k == len(set(got.labels.tolist()))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(2, 5).flatmap(
        lambda k: st.permutations([g for g in range(k) for _ in range(3)] + list(range(k)))
    ),
)
def test_planted_groups_are_recovered_in_any_order(seed: int, groups: list[int]) -> None:
    got = spectral(planted(seed, groups))
    assert got.k == len(set(groups))
    order = list(dict.fromkeys(groups))  # numbered by first appearance
    assert got.labels.tolist() == [order.index(g) for g in groups]


def test_homogeneous_clients_may_stay_together() -> None:
    D = planted(0, [0] * 8)
    assert spectral(D, k_min=1).k == 1
    assert spectral(D, k_min=1).labels.tolist() == [0] * 8
    assert spectral(D, k_min=2).k >= 2


def test_one_and_two_clients_are_one_group() -> None:
    for D in (np.zeros((1, 1)), np.array([[0.0, 0.7], [0.7, 0.0]])):
        got = spectral(D, 2, 10)
        assert got.k == 1
        assert got.labels.tolist() == [0] * len(D)
        assert got.eigenvalues.shape == (len(D),)
    assert spectral(planted(0, [0, 0, 1]), k_min=3).k == 2


def test_equal_clients() -> None:
    got = spectral(np.zeros((5, 5)))
    assert got.sigma == 1.0
    assert 1 <= got.k <= 2
    assert np.isfinite(got.eigenvalues).all()
    assert spectral(np.zeros((5, 5)), k_min=1).k == 1


def test_clients_all_at_one_distance_tie_to_the_fewest_groups() -> None:
    for clients in (4, 7, 12):
        assert spectral(np.ones((clients, clients)) - np.eye(clients)).k == 2


def test_many_duplicates_make_the_median_zero() -> None:
    groups = [0] * 9 + [1]
    D = 0.6 * (1 - np.equal.outer(groups, groups))
    got = spectral(D)
    assert got.sigma == pytest.approx(0.6)
    assert got.labels.tolist() == groups


def test_the_same_seed_gives_the_same_labels() -> None:
    D = random_distances(4, 14)
    assert spectral(D, seed=2**62).labels.tolist() == spectral(D, seed=2**62).labels.tolist()


def test_bad_ranges_and_matrices() -> None:
    for k_min, k_max in ((0, 3), (4, 3)):
        with pytest.raises(AdapterError, match="k_min"):
            spectral(random_distances(0, 5), k_min, k_max)
    with pytest.raises(AdapterError, match="not finite"):
        spectral(np.full((3, 3), np.nan))


def bases(seed: int, rank: int) -> dict[str, Matrix]:
    rng = np.random.default_rng(seed)
    return {site: np.linalg.qr(rng.normal(size=(10, rank)))[0] for site in ("query", "value")}


def test_an_unseen_client_joins_the_closest_subspace() -> None:
    clusters = [bases(seed, 3) for seed in range(4)]
    probe = {site: u[:, :2] for site, u in clusters[2].items()}
    winner, scores = match(probe, clusters)
    assert winner == 2
    assert scores[2] == pytest.approx(1.0)
    for score, cluster in zip(scores, clusters, strict=True):
        cosines = [np.linalg.svd(probe[s].T @ cluster[s], compute_uv=False) for s in probe]
        assert score == pytest.approx(np.mean([np.mean(c**2) for c in cosines]), abs=1e-12)


def test_match_refuses() -> None:
    with pytest.raises(AdapterError, match="no cluster"):
        match(bases(0, 2), [])
    with pytest.raises(AdapterError, match="cluster 1 adapt different sites"):
        match(bases(0, 2), [bases(0, 2), {"query": np.eye(10)}])
    with pytest.raises(AdapterError, match="'query'"):
        match(bases(0, 2), [{"query": np.eye(4), "value": np.eye(4)}])
