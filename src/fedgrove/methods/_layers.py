"""What Fed-HeLLo and FedRA share: clients that train some of the transformer's layers, and means
over those that did.

Layers are counted from 0, shallow to deep, among the layers that hold an adapted site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    return {
        name: factors
        for name, factors in adapter.items()
        if (sites[name].layer in wanted) == inside
    }


def budgets(names: Sequence[str], affordable: Sequence[float], layers: int) -> dict[str, int]:
    """How many layers each client trains: the shares are dealt to the clients in turn; at least one
    layer.
    """
    return {
        name: max(1, round(affordable[n % len(affordable)] * layers))
        for n, name in enumerate(names)
    }


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
        held = [
            (adapter, weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if site in adapter
        ]
        result[site] = (
            mean([{site: a[site]} for a, _ in held], [w for _, w in held])[site] if held else old
        )
    return result


def random_rows(counts: Sequence[int], layers: int, rng: torch.Generator) -> list[list[int]]:
    """Per client ``counts[i]`` distinct layers, ascending: a uniform draw each.

    Then a layer that nobody drew takes the place of one that several did, at a random client, as
    long as there is one.
    """
    rows = [set(torch.randperm(layers, generator=rng)[:count].tolist()) for count in counts]
    missing = sorted(set(range(layers)) - set().union(*rows))
    for layer in missing:
        holders = [sum(other in row for row in rows) for other in range(layers)]
        swaps = [
            (n, other) for n, row in enumerate(rows) for other in sorted(row) if holders[other] > 1
        ]
        if not swaps:
            break
        client, other = swaps[int(torch.randint(len(swaps), (1,), generator=rng))]
        rows[client] = rows[client] - {other} | {layer}
    return [sorted(row) for row in rows]


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
    counts = [1 if places >= layers else 0] * layers
    for _ in range(min(places, clients * layers) - sum(counts)):
        best = max(
            (n for n in range(layers) if counts[n] < clients),
            key=lambda n: (wanted[n] / (counts[n] + 1), -n),
        )
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
