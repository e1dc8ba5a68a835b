"""How far apart clients' ``B`` are, layer by layer (FedTreeLoRA, arXiv 2603.13282: only ``B`` is
compared).

``A`` starts from one shared draw and stays close to it; what tells clients apart after a local
warm-up is ``B``. The distance in a layer with several sites (query, value) is the mean over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.adapter import Sites
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.seeds import generator

Distance = Literal["frobenius", "cosine"]
Bs = Mapping[str, Tensor]  # site -> B [out, r]
Square = Float[Tensor, "N N"]  # of all pairs
Column = Float[Tensor, "N 1"]
Rows = Float[Tensor, "N numbers"]  # every client's B at one site

#: Below this share of the squared norms, a squared distance from the Gram matrix has lost too many
#: digits.
_LOST = 1e-6
_PAIRS = 4096  # how many pairs are compared directly at a time
_WIDTH = 256  # numbers of a random projection: of a squared distance 1/11 is its standard error
_BLOCK = 1000  # clients that are projected at a time


def layers_of(sites: Sites) -> dict[int, list[str]]:
    """``{layer: its sites}``, shallow to deep."""
    found: dict[int, list[str]] = {}
    for name, site in sites.items():
        names = found.setdefault(site.layer, [])
        names.append(name)
    by_depth = sorted(found.items())
    return dict(by_depth)


def between(
    clients: Sequence[Bs],
    sites: Sites,
    distance: Distance,
) -> Float[Tensor, "L N N"]:
    """Distances between N clients on each of L layers, float64 [L, N, N].

    ``frobenius``: ``‖B_i − B_j‖``; ``cosine``: ``1 − cos(B_i, B_j)``, where a zero ``B`` is at 1
    from any other and at 0 from another zero. One matrix product per site; nearly equal pairs are
    compared directly, so no digit is lost. Raises AdapterError where a client lacks a site or
    shapes differ.
    """
    layers: list[Tensor] = []
    for names in layers_of(sites).values():
        found: list[Tensor] = []
        for name in names:
            rows = _rows(clients, name)
            found.append(_pairs(rows, distance))
        layers.append(torch.stack(found).mean(0))
    return torch.stack(layers)


def towards(
    newcomer: Bs,
    clients: Sequence[Bs],
    sites: Sites,
    distance: Distance,
) -> Float[Tensor, "L N"]:
    """Distances from one newcomer to N clients on each of L layers, float64 [L, N]; measured as
    ``between`` does.
    """
    layers: list[Tensor] = []
    for names in layers_of(sites).values():
        found: list[Tensor] = []
        for name in names:
            rows = _rows([newcomer, *clients], name)
            if distance == "cosine":
                rows = _unit(rows)
            own = rows[:1]
            others = rows[1:]
            apart = (others - own).square().sum(1)
            finished = _finished(apart[None], own, others, distance)
            found.append(finished[0])
        layers.append(torch.stack(found).mean(0))
    return torch.stack(layers)


def roughly(
    clients: Sequence[Tensor],
    landmarks: Sequence[int],
    distance: Distance,
    site: str,
) -> Float[Tensor, "N M"]:
    """Distances from N clients to M of them at one site, float32, as ``between`` measures them but
    on random projections of their B [out, r].

    Johnson and Lindenstrauss: a squared distance is right on average, with a relative standard
    error of √(2 / 256); the mean over a model's sites is that much closer. The projection depends
    on the site's name alone.
    """
    numbers = clients[0].numel()
    draw = generator(0, "projection", site)
    projection = torch.randn(numbers, _WIDTH, generator=draw) / _WIDTH**0.5
    projected: list[Tensor] = []
    for start in range(0, len(clients), _BLOCK):
        held = [{site: B} for B in clients[start : start + _BLOCK]]
        rows = _rows(held, site)
        if distance == "cosine":
            rows = _unit(rows)
        projected.append(rows.float() @ projection)
    sketch = torch.cat(projected)
    chosen = sketch[list(landmarks)]
    squares = sketch.square().sum(1)
    sums = squares[:, None] + squares[list(landmarks)][None, :]
    apart = sums.addmm_(sketch, chosen.T, alpha=-2).clamp_min_(0.0)
    return _finished(apart, sketch, chosen, distance)


def _rows(clients: Sequence[Bs], site: str) -> Rows:
    """Every client's B at one site as a row, float64 [N, out · r]."""
    held = [client[site] for client in clients if site in client]
    shapes = {B.shape for B in held}
    if len(held) != len(clients) or len(shapes) != 1:
        raise AdapterError(
            f"Site '{site}': the clients' B are not of one shape; give all the same targets and "
            f"rank."
        )
    rows = [B.detach().reshape(-1) for B in held]
    return torch.stack(rows).double()


def _pairs(rows: Rows, distance: Distance) -> Square:
    if distance == "cosine":
        rows = _unit(rows)
    centred = rows - rows.mean(0)  # what all have in common only costs digits
    squares = centred.square().sum(1)
    sums = squares[:, None] + squares[None, :]
    products = 2 * centred @ centred.T
    apart = (sums - products).clamp_min(0.0)
    lost = torch.triu(apart <= _LOST * sums, diagonal=1)
    first, second = torch.nonzero(lost, as_tuple=True)
    for i, j in zip(first.split(_PAIRS), second.split(_PAIRS), strict=True):
        direct = (rows[i] - rows[j]).square()
        exact = direct.sum(1)
        apart[i, j] = exact
        apart[j, i] = exact
    result = _finished(apart, rows, rows, distance)
    even = (result + result.T) / 2
    return even.fill_diagonal_(0.0)


def _finished(
    apart: Float[Tensor, "n m"],
    left: Float[Tensor, "n numbers"],
    right: Float[Tensor, "m numbers"],
    distance: Distance,
) -> Float[Tensor, "n m"]:
    """From squared distances [n, m] (of unit rows for ``cosine``) to distances."""
    if distance == "frobenius":
        return apart.sqrt()
    left_there = left.any(1)
    right_there = right.any(1)
    one_is_zero = left_there[:, None] != right_there[None, :]
    one = torch.ones_like(apart)
    return torch.where(one_is_zero, one, apart / 2)


def _unit(rows: Rows) -> Rows:
    """Rows of norm 1; a zero row stays zero. Scaled first, so that no square under- or
    overflows.
    """
    largest = rows.abs().amax(1, keepdim=True)
    scaled = rows / _or_one(largest)
    norms = scaled.norm(dim=1, keepdim=True)
    return scaled / _or_one(norms)


def _or_one(divisors: Column) -> Column:
    """The divisors with 1 in place of 0."""
    one = torch.ones_like(divisors)
    return torch.where(divisors > 0, divisors, one)
