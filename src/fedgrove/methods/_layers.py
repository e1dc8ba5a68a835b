"""What Fed-HeLLo and FedRA share: clients that train some of the transformer's layers, and means
over those that did.

Layers are counted from 0, shallow to deep, among the layers that hold an adapted site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fedgrove.adapters.adapter import Adapter, Site
from fedgrove.adapters.algebra import mean


def layers_of(sites: Mapping[str, Site]) -> list[int]:
    """The layers that hold a site, shallow to deep."""
    return sorted({site.layer for site in sites.values()})


def part(
    adapter: Adapter, sites: Mapping[str, Site], layers: Sequence[int], *, inside: bool = True
) -> Adapter:
    """The adapter at the sites of these layers (or, not ``inside``, at the others)."""
    wanted = set(layers)
    found: Adapter = {}
    for name, factors in adapter.items():
        if (sites[name].layer in wanted) == inside:
            found[name] = factors
    return found


def budgets(names: Sequence[str], affordable: Sequence[float], layers: int) -> dict[str, int]:
    """How many layers each client trains: the shares are dealt to the clients in turn; at least one
    layer.
    """
    counts = [max(1, round(share * layers)) for share in affordable]
    return {name: counts[place % len(counts)] for place, name in enumerate(names)}


def mean_where_held(
    previous: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]
) -> Adapter:
    """FedIT's mean at each site over the clients that have it; a site that nobody has keeps its
    value.

    Where all have all sites this is ``mean``, bit for bit. AdapterError where ranks or scales
    differ.
    """
    result: Adapter = {}
    for site, old in previous.items():
        pairs = zip(adapters, weights, strict=True)
        held = [({site: each[site]}, weight) for each, weight in pairs if site in each]
        result[site] = old
        if held:
            parts, own = zip(*held, strict=True)
            result[site] = mean(list(parts), list(own))[site]
    return result


def random_rows(counts: Sequence[int], layers: int, rng: torch.Generator) -> list[list[int]]:
    """Per client ``counts[i]`` distinct layers, ascending: a uniform draw each.

    Then a layer that nobody drew takes the place of one that several did, at a random client, as
    long as there is one.
    """
    rows = [set(torch.randperm(layers, generator=rng)[:count].tolist()) for count in counts]
    missing = sorted(set(range(layers)) - set().union(*rows))
    for layer in missing:
        held = [sum(other in row for row in rows) for other in range(layers)]
        swaps = []
        for place, row in enumerate(rows):
            swaps += [(place, other) for other in sorted(row) if held[other] > 1]
        if not swaps:
            break
        client, other = swaps[int(torch.randint(len(swaps), (1,), generator=rng))]
        rows[client] = rows[client] - {other} | {layer}
    return [sorted(row) for row in rows]


def score_groups(scores: Sequence[float], groups: int = 3) -> list[int]:
    """For each score its group by k-means in one dimension, 0 being the lowest.

    Fewer groups where there are fewer distinct scores; the highest is then still ``groups - 1``, so
    that equal scores are all in it.
    """
    from sklearn.cluster import KMeans

    distinct = len(set(scores))
    wanted = min(groups, distinct)
    points = np.array(scores, dtype=np.float64)[:, None]
    found = KMeans(n_clusters=wanted, n_init=10, random_state=0).fit(points)
    order = np.argsort(found.cluster_centers_[:, 0])
    rank = {int(label): groups - wanted + place for place, label in enumerate(order)}
    return [rank[int(label)] for label in found.labels_]


#: How the share of clients that train a layer changes with its depth.
SHAPES = ("uniform", "triangle", "inverted_triangle", "bottleneck")


def profile(shape: str, layers: int) -> list[float]:
    """The wanted share of each layer, not normalised: falling with depth for a triangle, high at
    both ends ...
    """
    if shape == "triangle":
        return [float(layers - n) for n in range(layers)]
    if shape == "inverted_triangle":
        return [float(n + 1) for n in range(layers)]
    if shape == "bottleneck":
        return [float(abs(2 * n - (layers - 1)) + 1) for n in range(layers)]
    return [1.0] * layers


def holders(shape: str, places: int, clients: int, layers: int) -> list[int]:
    """How many clients train each layer: ``places`` in all, at most one per client, one for each
    where they suffice.

    Each place goes to the layer that has fewest for its share (d'Hondt's rule), ties to the
    shallower.
    """
    wanted = profile(shape, layers)
    counts = [int(places >= layers)] * layers
    for _ in range(min(places, clients * layers) - sum(counts)):
        free = [n for n in range(layers) if counts[n] < clients]
        best = max(free, key=lambda n: (wanted[n] / (counts[n] + 1), -n))
        counts[best] += 1
    return counts


def shaped_rows(
    shape: str, counts: Sequence[int], layers: int, rng: torch.Generator | None
) -> list[list[int]]:
    """Per client ``counts[i]`` distinct layers, ascending, so that each layer has ``holders(...)``
    clients.

    The clients with the most layers choose first, each those with the most places left (Gale and
    Ryser's rule, which meets the counts wherever they can be met). With ``rng`` it is random who
    trains what; the shape stays.
    """
    left = holders(shape, sum(counts), len(counts), layers)
    clients, order = list(range(len(counts))), list(range(layers))
    if rng is not None:
        clients = torch.randperm(len(counts), generator=rng).tolist()
    rows: list[list[int]] = [[] for _ in counts]
    for client in sorted(clients, key=lambda n: -counts[n]):
        if rng is not None:
            order = torch.randperm(layers, generator=rng).tolist()
        chosen = sorted(order, key=lambda n: -left[n])[: counts[client]]
        for layer in chosen:
            left[layer] -= 1
        rows[client] = sorted(chosen)
    return rows
