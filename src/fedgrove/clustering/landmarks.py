"""Groups of more clients than can all be compared: some are landmarks, which are grouped exactly,
and every other client joins the group whose landmarks it is close to, as a newcomer would.

All pairs of N clients cost N² distances at each layer; landmarks cost N · ``LANDMARKS`` rough ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.clustering.matrix import Labels
from fedgrove.ground.seeds import numpy_rng

EXACT = 2000  # clients of whom all pairs are compared
LANDMARKS = 1000  # of more clients than that


def landmarks(clients: int) -> NDArray[np.int64]:
    """The rows of those that are compared with each other, ascending: all of a few clients, else a
    draw that depends on their number alone.
    """
    if clients <= EXACT:
        return np.arange(clients)
    draw = numpy_rng(0, "landmarks", clients)
    drawn = draw.choice(clients, LANDMARKS, replace=False)
    return np.sort(drawn)


def joined(labels: ArrayLike, distances: ArrayLike) -> Labels:
    """The group that each client is closest to on average, as ``tree.nearest`` finds it for one.

    Args:
        labels: [M], the landmarks' groups, from 0. distances: [n, M] from clients to them.
    """
    groups = np.asarray(labels)
    apart = np.asarray(distances)
    member = np.zeros((len(groups), int(groups.max()) + 1), dtype=apart.dtype)
    member[np.arange(len(groups)), groups] = 1
    means = apart @ member / member.sum(0)
    return means.argmin(1).astype(np.int64)
