"""What Fed-HeLLo and FedRA share: clients that train some of the transformer's layers, and means
over those that did.

Layers are counted from 0, shallow to deep, among the layers that hold an adapted site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle

import numpy as np
import torch

from fedgrove.adapters.adapter import Adapter, Sites
from fedgrove.adapters.algebra import mean


def layers_of(sites: Sites) -> list[int]:
    """The layers that hold a site, shallow to deep."""
    found = {site.layer for site in sites.values()}
    return sorted(found)


def part(
    adapter: Adapter,
    sites: Sites,
    layers: Sequence[int],
    *,
    inside: bool = True,
) -> Adapter:
    """The adapter at the sites of these layers (or, not ``inside``, at the others)."""
    wanted = set(layers)
    found: Adapter = {}
    for name, factors in adapter.items():
        held = sites[name].layer in wanted
        if held == inside:
            found[name] = factors
    return found


def budgets(
    names: Sequence[str],
    affordable: Sequence[float],
    layers: int,
) -> dict[str, int]:
    """How many layers each client trains: the shares are dealt to the clients in turn; at least one
    layer.
    """
    counts = [max(1, round(share * layers)) for share in affordable]
    dealt = zip(names, cycle(counts), strict=False)
    return dict(dealt)


def mean_where_held(
    previous: Adapter,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
) -> Adapter:
    """FedIT's mean at each site over the clients that have it; a site that nobody has keeps its
    value.

    Where all have all sites this is ``mean``, bit for bit. AdapterError where ranks or scales
    differ.
    """
    result: Adapter = {}
    for site, old in previous.items():
        held: list[Adapter] = []
        shares: list[float] = []
        for adapter, weight in zip(adapters, weights, strict=True):
            if site in adapter:
                held.append({site: adapter[site]})
                shares.append(weight)
        result[site] = old
        if held:
            found = mean(held, shares)
            result[site] = found[site]
    return result


def random_rows(
    counts: Sequence[int],
    layers: int,
    rng: torch.Generator,
) -> list[list[int]]:
    """Per client ``counts[i]`` distinct layers, ascending: a uniform draw each.

    Then a layer that nobody drew takes the place of one that several did, at a random client, as
    long as there is one.
    """
    rows: list[set[int]] = []
    for count in counts:
        order = torch.randperm(layers, generator=rng)
        rows.append(set(order[:count].tolist()))
    drawn = set().union(*rows)
    missing = set(range(layers)) - drawn
    for layer in sorted(missing):
        swaps = _spare(rows)
        if not swaps:
            break
        chosen = torch.randint(len(swaps), (1,), generator=rng)
        client, other = swaps[int(chosen)]
        rows[client] = rows[client] - {other} | {layer}
    return [sorted(row) for row in rows]


def _spare(rows: Sequence[set[int]]) -> list[tuple[int, int]]:
    """(client, layer) for each layer of a client that another client has too."""
    holders: Counter[int] = Counter()
    for row in rows:
        holders.update(row)
    spare: list[tuple[int, int]] = []
    for client, row in enumerate(rows):
        shared = [layer for layer in sorted(row) if holders[layer] > 1]
        spare += [(client, layer) for layer in shared]
    return spare


def score_groups(scores: Sequence[float], groups: int = 3) -> list[int]:
    """For each score its group by k-means in one dimension, 0 being the lowest.

    Fewer groups where there are fewer distinct scores; the highest is then still ``groups - 1``, so
    that equal scores are all in it.
    """
    from sklearn.cluster import KMeans

    distinct = len(set(scores))
    wanted = min(groups, distinct)
    points = np.array(scores, dtype=np.float64)[:, None]
    search = KMeans(n_clusters=wanted, n_init=10, random_state=0)
    found = search.fit(points)
    order = np.argsort(found.cluster_centers_[:, 0])
    lowest = groups - wanted
    group: dict[int, int] = {}
    for place, label in enumerate(order):
        group[int(label)] = lowest + place
    return [group[int(label)] for label in found.labels_]


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
        last = layers - 1
        return [float(abs(2 * n - last) + 1) for n in range(layers)]
    return [1.0] * layers


def holders(
    shape: str,
    places: int,
    clients: int,
    layers: int,
) -> list[int]:
    """How many clients train each layer: ``places`` in all, at most one per client, one for each
    where they suffice.

    Each place goes to the layer that has fewest for its share (d'Hondt's rule), ties to the
    shallower.
    """
    wanted = profile(shape, layers)
    counts = [int(places >= layers)] * layers

    def due(layer: int) -> tuple[float, int]:
        return wanted[layer] / (counts[layer] + 1), -layer

    most = min(places, clients * layers)
    for _ in range(most - sum(counts)):
        free = [n for n in range(layers) if counts[n] < clients]
        best = max(free, key=due)
        counts[best] += 1
    return counts


def shaped_rows(
    shape: str,
    counts: Sequence[int],
    layers: int,
    rng: torch.Generator | None,
) -> list[list[int]]:
    """Per client ``counts[i]`` distinct layers, ascending, so that each layer has ``holders(...)``
    clients.

    The clients with the most layers choose first, each those with the most places left (Gale and
    Ryser's rule, which meets the counts wherever they can be met). With ``rng`` it is random who
    trains what; the shape stays.
    """
    count = len(counts)
    left = holders(shape, sum(counts), count, layers)
    clients = _order(count, rng)
    clients.sort(key=lambda client: -counts[client])
    rows: list[list[int]] = [[] for _ in counts]
    for client in clients:
        order = _order(layers, rng)
        order.sort(key=lambda layer: -left[layer])
        chosen = order[: counts[client]]
        for layer in chosen:
            left[layer] -= 1
        rows[client] = sorted(chosen)
    return rows


def _order(count: int, rng: torch.Generator | None) -> list[int]:
    """The numbers below ``count``: ascending, or in a random order."""
    if rng is None:
        return list(range(count))
    return torch.randperm(count, generator=rng).tolist()
