"""How far apart clients' ``B`` are, layer by layer (FedTreeLoRA, arXiv 2603.13282: only ``B`` is
compared).

``A`` starts from one shared draw and stays close to it; what tells clients apart after a local
warm-up is ``B``. The distance in a layer with several sites (query, value) is the mean over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Site
from fedgrove.ground.errors import AdapterError

Distance = Literal["frobenius", "cosine"]
Bs = Mapping[str, Tensor]  # site -> B [out, r]

#: Below this share of the squared norms, a squared distance from the Gram matrix has lost too many
#: digits.
_LOST = 1e-6
_PAIRS = 4096  # how many pairs are compared directly at a time


def layers_of(sites: Mapping[str, Site]) -> dict[int, list[str]]:
    """``{layer: its sites}``, shallow to deep."""
    found: dict[int, list[str]] = {}
    for name, site in sites.items():
        found.setdefault(site.layer, []).append(name)
    return dict(sorted(found.items()))


def between(clients: Sequence[Bs], sites: Mapping[str, Site], distance: Distance) -> Tensor:
    """Distances between N clients on each of L layers, float64 [L, N, N].

    ``frobenius``: ``‖B_i − B_j‖``; ``cosine``: ``1 − cos(B_i, B_j)``, where a zero ``B`` is at 1
    from any other and at 0 from another zero. One matrix product per site; nearly equal pairs are
    compared directly, so no digit is lost. Raises AdapterError where a client lacks a site or
    shapes differ.
    """
    return torch.stack(
        [
            torch.stack([_pairs(_rows(clients, name), distance) for name in names]).mean(0)
            for names in layers_of(sites).values()
        ]
    )


def towards(
    newcomer: Bs, clients: Sequence[Bs], sites: Mapping[str, Site], distance: Distance
) -> Tensor:
    """Distances from one newcomer to N clients on each of L layers, float64 [L, N]; measured as
    ``between`` does.
    """
    result = []
    for names in layers_of(sites).values():
        each = []
        for name in names:
            rows = _rows([newcomer, *clients], name)
            if distance == "cosine":
                rows = _unit(rows)
            apart = (rows[1:] - rows[0]).square().sum(1)
            each.append(_finished(apart[None], rows[:1], rows[1:], distance)[0])
        result.append(torch.stack(each).mean(0))
    return torch.stack(result)


def _rows(clients: Sequence[Bs], site: str) -> Tensor:
    """Every client's B at one site as a row, float64 [N, out · r]."""
    shapes = {tuple(client[site].shape) if site in client else None for client in clients}
    if len(shapes) != 1 or None in shapes:
        raise AdapterError(
            f"Site '{site}': the clients' B are not of one shape; give all the same targets and "
            f"rank."
        )
    return torch.stack([client[site].detach().reshape(-1) for client in clients]).double()


def _pairs(rows: Tensor, distance: Distance) -> Tensor:
    if distance == "cosine":
        rows = _unit(rows)
    centred = rows - rows.mean(0)  # what all have in common only costs digits
    squares = centred.square().sum(1)
    sums = squares[:, None] + squares[None, :]
    apart = (sums - 2 * centred @ centred.T).clamp_min(0.0)
    first, second = torch.nonzero(torch.triu(apart <= _LOST * sums, diagonal=1), as_tuple=True)
    for i, j in zip(first.split(_PAIRS), second.split(_PAIRS), strict=True):
        apart[i, j] = apart[j, i] = (rows[i] - rows[j]).square().sum(1)
    result = _finished(apart, rows, rows, distance)
    result = (result + result.T) / 2
    return result.fill_diagonal_(0.0)


def _finished(apart: Tensor, left: Tensor, right: Tensor, distance: Distance) -> Tensor:
    """From squared distances [n, m] (of unit rows for ``cosine``) to distances."""
    if distance == "frobenius":
        return apart.sqrt()
    one_is_zero = (left.any(1)[:, None]) != (right.any(1)[None, :])
    return torch.where(one_is_zero, torch.ones_like(apart), apart / 2)


def _unit(rows: Tensor) -> Tensor:
    """Rows of norm 1; a zero row stays zero. Scaled first, so that no square under- or
    overflows.
    """
    largest = rows.abs().amax(1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
    norms = scaled.norm(dim=1, keepdim=True)
    return scaled / torch.where(norms > 0, norms, torch.ones_like(norms))
