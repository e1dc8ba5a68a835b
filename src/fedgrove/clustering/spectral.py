"""HiLoRA's spectral clustering of clients with an eigengap, and routing of a client never seen
(arXiv 2603.02785).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.clustering.matrix import Labels, Matrix, checked, renumbered
from fedgrove.ground.errors import AdapterError

Bases = Mapping[str, ArrayLike]  # site -> orthonormal [out, r]


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """``labels`` int64 [N], ``eigenvalues`` [N] of the normalised Laplacian (ascending), ``k``
    groups, ``sigma``.
    """

    labels: Labels
    eigenvalues: NDArray[np.float64]
    k: int
    sigma: float


def spectral(
    D: ArrayLike,
    k_min: int = 2,
    k_max: int = 10,
    seed: int = 0,
) -> Clusters:
    """Groups of clients by spectral clustering, as many as the largest eigengap says.

    Affinity ``W = exp(-D^2 / (2 sigma^2))`` with its diagonal of ones, ``sigma`` the median
    off-diagonal distance;
    ``L = I - deg^-1/2 W deg^-1/2``; ``k`` in ``[k_min, min(k_max, N - 1)]`` with the largest
    ``lambda_{k+1} - lambda_k`` (ties to the smaller); k-means on the unit rows of the first ``k``
    eigenvectors, its starts fixed by
    ``seed``.

    Few clients: one or two always form one group, since ``k <= N - 1``; a ``k_min`` above ``N - 1``
    is lowered to it. Equal distances: where the median is 0, sigma is the mean of the positive
    distances, or 1 if all are 0. Clients that coincide cannot be told apart, so there may be fewer
    groups than the eigengap asked for. Raises AdapterError for a bad matrix or ``k_min < 1`` or
    ``k_max < k_min``.
    """
    if not 1 <= k_min <= k_max:
        raise AdapterError(
            f"The number of clusters cannot lie in {k_min}..{k_max}: give 1 <= k_min <= k_max."
        )
    matrix = checked(D)
    clients = len(matrix)
    sigma = _bandwidth(matrix)
    laplacian = _laplacian(matrix, sigma)
    values, vectors = np.linalg.eigh(laplacian)
    most = max(1, min(k_max, clients - 1))
    least = min(k_min, most)
    k = _largest_gap(values, least, most)
    labels = _k_means(vectors[:, :k], k, seed)
    found = int(labels.max()) + 1
    return Clusters(
        labels=labels,
        eigenvalues=values,
        k=found,
        sigma=sigma,
    )


def _laplacian(matrix: Matrix, sigma: float) -> Matrix:
    squares = matrix**2
    width = 2 * sigma**2
    affinity = np.exp(-squares / width)
    root = affinity.sum(1) ** -0.5
    of_row = root[:, None]
    of_column = root[None, :]
    normalised = of_row * affinity * of_column
    identity = np.eye(len(matrix))
    return identity - normalised


def _largest_gap(
    eigenvalues: NDArray[np.float64],
    least: int,
    most: int,
) -> int:
    """The number of groups from ``least`` to ``most`` after which the eigenvalues leap most."""
    above = eigenvalues[least : most + 1]
    below = eigenvalues[least - 1 : most]
    gaps = above - below
    if not len(gaps):
        return 1
    # Equal gaps (clients all at one distance) differ by rounding alone: the first within it wins.
    nearly = gaps.max() - 1e-9
    first = np.argmax(gaps >= nearly)
    return least + int(first)


def match(
    probe: Bases,
    clusters: Sequence[Bases],
) -> tuple[int, list[float]]:
    """The cluster that an unseen client joins: ``argmax_j`` of the mean squared cosine of principal
    angles.

    Args:
        probe: ``{site: orthonormal basis [out, r]}`` of the client's probe adapter.
        clusters: the same for each cluster's adapter; ranks may differ from the probe's.

    Returns the index of the cluster (ties to the lower) and the score of each in [0, 1]: the mean
    over sites of
    ``||U^T V||^2 / min(r, r')``. Raises AdapterError where sites or shapes do not match.
    """
    if not clusters:
        raise AdapterError("There is no cluster to join: cluster the clients first.")
    scores: list[float] = []
    for number, cluster in enumerate(clusters):
        if cluster.keys() != probe.keys() or not probe:
            raise AdapterError(
                f"The probe and cluster {number} adapt different sites: use the same targets."
            )
        cosines: list[float] = []
        for site, basis in probe.items():
            cosine = _mean_cosine(site, basis, cluster[site])
            cosines.append(cosine)
        scores.append(float(np.mean(cosines)))
    best = int(np.argmax(scores))
    return best, scores


def _mean_cosine(
    site: str,
    first: ArrayLike,
    second: ArrayLike,
) -> float:
    u = np.asarray(first, dtype=np.float64)
    v = np.asarray(second, dtype=np.float64)
    tables = u.ndim == v.ndim == 2
    if not tables or u.shape[0] != v.shape[0]:
        raise AdapterError(
            f"Site '{site}': bases {list(u.shape)} and {list(v.shape)} lie in different spaces."
        )
    squares = np.square(u.T @ v)
    rank = min(u.shape[1], v.shape[1])
    return float(squares.sum() / rank)


def _bandwidth(matrix: Matrix) -> float:
    above_diagonal = np.triu_indices(len(matrix), 1)
    pairs = matrix[above_diagonal]
    if not pairs.any():
        return 1.0
    middle = float(np.median(pairs))
    if middle > 0:
        return middle
    apart = pairs[pairs > 0]
    return float(apart.mean())


def _k_means(
    vectors: Matrix,
    k: int,
    seed: int,
) -> Labels:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if k == 1:
        return np.zeros(len(vectors), dtype=np.int64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    divisors = np.where(lengths > 0, lengths, 1.0)
    rows = vectors / divisors
    search = KMeans(
        n_clusters=k,
        n_init=10,
        random_state=seed % 2**32,
    )
    with warnings.catch_warnings():
        # Said when clients coincide and fewer than k groups exist; the docstring says what happens
        # then.
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(rows)
    return renumbered(search.labels_)
