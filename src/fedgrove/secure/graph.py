"""Who masks with whom, and how many must answer.

Bell, Bonawitz, Gascón, Lepoint and Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead" (CCS 2020): not every pair shares a mask, but each client with ``degree`` neighbours on a
ring in random order (a Harary graph), who also hold the shares of its secrets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cache

THRESHOLD = 2 / 3  # the share of clients that must answer, where the job names none
COLLUDING = 0.2  # the share of clients that a degree is safe against, beside the server
UNLUCKY = 1e-4  # chance that a round fails although fewer were lost than a degree is made for
SMALL = 64  # up to so many clients all are neighbours, and each sees for itself who takes part
UNSAFE = 2.0**-40  # chance that colluding clients hold enough of somebody's shares


def needed(threshold: float, clients: int) -> int:
    """How many of ``clients`` must answer: at least two, for the sum of one is its update."""
    return max(2, math.ceil(threshold * clients - 1e-9))


def lost_at_most(threshold: float) -> float:
    """The share of clients that may be lost where each has the neighbours that ``degree`` says."""
    return 0.6 * (1 - threshold)


@cache
def degree(
    clients: int,
    threshold: float,
    wanted: int | None = None,
) -> int:
    """How many neighbours each client has: an even number, or all the others.

    ``wanted``: what the job says. None: as few as are likely enough to bear the loss of
    ``lost_at_most``, with ``COLLUDING`` of the clients on the server's side.
    """
    if wanted is not None:
        chosen = wanted + wanted % 2
        return min(chosen, clients - 1)
    for neighbours in range(2, clients - 1, 2):
        if clients > SMALL and _enough(clients, neighbours, threshold):
            return neighbours
    return clients - 1


def _enough(
    clients: int,
    neighbours: int,
    threshold: float,
) -> bool:
    """Whether no neighbourhood of the round is likely to be too small, or bought."""
    from scipy.stats import hypergeom

    others = clients - 1
    holders = needed(threshold, neighbours + 1)
    lost = math.ceil(lost_at_most(threshold) * clients)
    present = others - lost
    too_few = hypergeom.cdf(holders - 1, others, present, neighbours)
    colluding = math.ceil(COLLUDING * clients)
    bought = hypergeom.sf(holders - 1, others, colluding, neighbours)
    return bool(clients * too_few < UNLUCKY and clients * bought < UNSAFE)


def ring(
    names: Sequence[str],
    neighbours: int,
    seed: str,
) -> dict[str, list[str]]:
    """Each client's neighbours, in name order: those next to it on a ring that ``seed`` shuffles.

    ``neighbours``: even and below the number of clients, or that number less one.
    """
    order = sorted(names)
    if neighbours >= len(order) - 1:
        return {name: [other for other in order if other != name] for name in order}
    random.Random(seed).shuffle(order)
    found: dict[str, list[str]] = {}
    reach = neighbours // 2
    steps = [step for step in range(-reach, reach + 1) if step]
    for place, name in enumerate(order):
        beside = [order[(place + step) % len(order)] for step in steps]
        found[name] = sorted(beside)
    return found
