"""What every distance matrix and every labelling here has in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.ground.errors import AdapterError


def checked(D: ArrayLike) -> NDArray[np.float64]:
    """D [N, N] as float64, exactly symmetric and with an exactly zero diagonal.

    Raises AdapterError unless it is square, finite, not negative, and both of these up to rounding.
    """
    matrix = np.array(D, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise AdapterError(
            f"Client distances have shape {list(matrix.shape)}: give one row and column per client."
        )
    if bad := np.argwhere(~np.isfinite(matrix)).tolist():
        raise AdapterError(
            f"The distance of clients {bad[0]} is not finite: look for NaN in their adapters."
        )
    slack = 1e-5 * float(np.abs(matrix).max())
    if (
        matrix.min() < -slack
        or np.abs(np.diag(matrix)).max() > slack
        or np.abs(matrix - matrix.T).max() > slack
    ):
        raise AdapterError(
            "Client distances must be symmetric, not negative, and 0 on the diagonal."
        )
    matrix = np.maximum((matrix + matrix.T) / 2, 0.0)
    np.fill_diagonal(matrix, 0.0)
    return matrix


def renumbered(labels: NDArray[Any]) -> NDArray[np.int64]:
    """The same groups, numbered 0, 1, ... by first appearance in row order."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return order[inverse].astype(np.int64)
