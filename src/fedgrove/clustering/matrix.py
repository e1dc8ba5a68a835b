"""What every distance matrix and every labelling here has in common."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.ground.errors import AdapterError

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]  # [N], the group of each client


def checked(D: ArrayLike) -> Matrix:
    """D [N, N] as float64, exactly symmetric and with an exactly zero diagonal.

    Raises AdapterError unless it is square, finite, not negative, and both of these up to rounding.
    """
    matrix = np.array(D, dtype=np.float64)
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    if not square or not len(matrix):
        raise AdapterError(
            f"Client distances have shape {list(matrix.shape)}: give one row and column per client."
        )
    bad = np.argwhere(~np.isfinite(matrix))
    if len(bad):
        pair = bad[0].tolist()
        raise AdapterError(
            f"The distance of clients {pair} is not finite: look for NaN in their adapters."
        )
    largest = np.abs(matrix).max()
    slack = 1e-5 * float(largest)
    lowest = matrix.min()
    diagonal = np.diag(matrix)
    skew = matrix - matrix.T
    off = max(np.abs(diagonal).max(), np.abs(skew).max())
    if lowest < -slack or off > slack:
        raise AdapterError(
            "Client distances must be symmetric, not negative, and 0 on the diagonal."
        )
    even = (matrix + matrix.T) / 2
    matrix = np.maximum(even, 0.0)
    np.fill_diagonal(matrix, 0.0)
    return matrix


def renumbered(labels: NDArray[np.integer]) -> Labels:
    """The same groups, numbered 0, 1, ... by first appearance in row order."""
    _, first, inverse = np.unique(
        labels,
        return_index=True,
        return_inverse=True,
    )
    by_appearance = np.argsort(first)
    order = np.argsort(by_appearance)
    return order[inverse].astype(np.int64)
