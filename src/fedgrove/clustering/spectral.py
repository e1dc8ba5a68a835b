"""HiLoRA's spectral clustering of clients with an eigengap, and routing of a client never seen
(arXiv 2603.02785).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.clustering.matrix import checked, renumbered
from fedgrove.ground.errors import AdapterError


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """``labels`` int64 [N], ``eigenvalues`` [N] of the normalised Laplacian (ascending), ``k``
    groups, ``sigma``.
    """

    labels: NDArray[np.int64]
    eigenvalues: NDArray[np.float64]
    k: int
    sigma: float


def spectral(D: ArrayLike, k_min: int = 2, k_max: int = 10, seed: int = 0) -> Clusters:
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
    sigma = _bandwidth(matrix)
    affinity = np.exp(-(matrix**2) / (2 * sigma**2))
    degree = affinity.sum(1) ** -0.5
    values, vectors = np.linalg.eigh(
        np.eye(len(matrix)) - degree[:, None] * affinity * degree[None, :]
    )
    most = max(1, min(k_max, len(matrix) - 1))
    least = min(k_min, most)
    gaps = values[least : most + 1] - values[least - 1 : most]
    # Equal gaps (clients all at one distance) differ by rounding alone: the first within it wins.
    if len(gaps):
        k = least + int(np.argmax(gaps >= gaps.max() - 1e-9))
    else:
        k = 1
    labels = _k_means(vectors[:, :k], k, seed)
    return Clusters(labels=labels, eigenvalues=values, k=int(labels.max()) + 1, sigma=sigma)


def match(
    probe: Mapping[str, ArrayLike], clusters: Sequence[Mapping[str, ArrayLike]]
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
    scores = []
    for number, cluster in enumerate(clusters):
        if cluster.keys() != probe.keys() or not probe:
            raise AdapterError(
                f"The probe and cluster {number} adapt different sites: use the same targets."
            )
        scores.append(
            float(np.mean([_mean_cosine(site, probe[site], cluster[site]) for site in probe]))
        )
    return int(np.argmax(scores)), scores


def _mean_cosine(site: str, first: Any, second: Any) -> float:
    u, v = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if u.ndim != 2 or v.ndim != 2 or u.shape[0] != v.shape[0]:
        raise AdapterError(
            f"Site '{site}': bases {list(u.shape)} and {list(v.shape)} lie in different spaces."
        )
    return float(np.square(u.T @ v).sum() / min(u.shape[1], v.shape[1]))


def _bandwidth(matrix: NDArray[np.float64]) -> float:
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    if not pairs.any():
        return 1.0
    middle = float(np.median(pairs))
    if middle > 0:
        return middle
    return float(pairs[pairs > 0].mean())


def _k_means(vectors: NDArray[np.float64], k: int, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if k == 1:
        return np.zeros(len(vectors), dtype=np.int64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = vectors / np.where(lengths > 0, lengths, 1.0)
    with warnings.catch_warnings():
        # Said when clients coincide and fewer than k groups exist; the docstring says what happens
        # then.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(n_clusters=k, n_init=10, random_state=seed % 2**32).fit(rows)
    return renumbered(found.labels_)
