"""Groups of more clients than can all be compared: some are landmarks, which are grouped exactly,
and every other client joins the group whose landmarks it is close to, as a newcomer would.

All pairs of N clients cost N² distances at each layer; landmarks cost N · ``LANDMARKS`` rough ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedgrove.clustering.matrix import Labels, Matrix
from fedgrove.clustering.tree import members_of
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


def leaves(Z: Matrix, distances: ArrayLike) -> NDArray[np.int64]:
    """The leaf of the tree that each client comes to, as ``tree.descend`` goes down for one.

    Args:
        Z: the tree of M landmarks, from ``merge_tree``. distances: [n, M] from clients to them.
    """
    apart = np.asarray(distances)
    count = len(Z) + 1
    members = members_of(Z)
    found = np.zeros(len(apart), dtype=np.int64)
    waiting = [(len(members) - 1, np.arange(len(apart)))]
    while waiting:
        node, rows = waiting.pop()
        if node < count:
            found[rows] = node
            continue
        children = [int(child) for child in Z[node - count, :2]]
        first, second = sorted(children, key=lambda child: int(members[child].min()))
        to_first = apart[np.ix_(rows, members[first])].mean(1)
        to_second = apart[np.ix_(rows, members[second])].mean(1)
        closer = to_first <= to_second
        for child, own in ((first, rows[closer]), (second, rows[~closer])):
            if len(own):
                waiting.append((child, own))
    return found


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
