"""The one place where clients' numbers become one: a weighted mean, or what a defence has in its
place.

Every mean of the server's rules passes here, group by group, tier by tier and index by index, so a
defence that is in use composes with each of them. A defence may do two things: weigh the members of
a group anew by their inner products (``weights``), and give another centre of their coordinates
than the weighted sum (``value``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.adapter import Adapter

Gram = Float[Tensor, "clients clients"]  # inner products of the members, float64


class Centre(Protocol):
    """A defence while the server's half works."""

    def weights(
        self,
        members: Sequence[Tensor],
        gram: Gram,
        shares: Sequence[float],
    ) -> list[float]:
        """The shares of a group's members, not negative, adding up to 1.

        Args:
            members: a tensor ``[...]`` of each, by whose identity the defence knows whose it is.
            gram: of what they sent.
            shares: what the method's own rule gives them.
        """

    def value(
        self, stack: Float[Tensor, "clients ..."], shares: Float[Tensor, " clients"]
    ) -> Float[Tensor, ...] | None:
        """The centre of each coordinate; None for the weighted sum."""


_centre: ContextVar[Centre | None] = ContextVar("centre", default=None)
_weighed: ContextVar[bool] = ContextVar("weighed", default=False)


@contextmanager
def defended(centre: Centre) -> Iterator[None]:
    """Within it every mean is the defence's."""
    token = _centre.set(centre)
    try:
        yield
    finally:
        _centre.reset(token)


@contextmanager
def weighed() -> Iterator[None]:
    """Within it the members have the shares of the whole update: a site of it is not judged again."""
    token = _weighed.set(True)
    try:
        yield
    finally:
        _weighed.reset(token)


def active() -> Centre | None:
    """The defence in use."""
    return _centre.get()


def reweighed(
    members: Sequence[Tensor],
    gram: Callable[[], Gram],
    shares: Sequence[float],
) -> list[float]:
    """The shares of a group's members, a tensor ``[...]`` of each: as given, or the defence's."""
    centre = _centre.get()
    if centre is None or _weighed.get():
        return list(shares)
    return centre.weights(members, gram(), shares)


def shares_of(adapters: Sequence[Adapter], shares: Sequence[float]) -> list[float]:
    """``reweighed`` for adapters, by the inner products of their updates."""
    if active() is None or not all(adapters):
        return list(shares)
    members = [next(iter(adapter.values())).A for adapter in adapters]
    return reweighed(members, lambda: product_gram(adapters), shares)


def centred(parts: Sequence[Float[Tensor, ...]], shares: Sequence[float]) -> Float[Tensor, ...]:
    """The weighted sum of the parts in float64, added up in their order; or the defence's centre."""
    centre = _centre.get()
    if centre is not None:
        stack = torch.stack([part.double() for part in parts])
        weights = torch.tensor(shares, dtype=torch.float64)
        found = centre.value(stack, weights)
        if found is not None:
            return found
    total = torch.zeros_like(parts[0], dtype=torch.float64)
    for share, part in zip(shares, parts, strict=True):
        total += share * part.double()
    return total


def product_gram(adapters: Sequence[Adapter]) -> Gram:
    """``⟨s_i B_i A_i, s_j B_j A_j⟩`` over all sites, without a dense product: where two adapters
    do the same to the model they are the same here, whatever their factors. Ranks may differ.
    """
    count = len(adapters)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for site in adapters[0]:
        factors = [adapter[site] for adapter in adapters]
        A = torch.cat([each.A.double() for each in factors])  # [ranks, in]
        B = torch.cat([each.B.double() * each.scale for each in factors], 1)  # [out, ranks]
        down = A @ A.T
        up = B.T @ B
        products = up * down  # of every module with every other
        ranks = torch.tensor([each.rank for each in factors])
        owner = torch.repeat_interleave(torch.arange(count), ranks)
        rows = torch.zeros(count, len(owner), dtype=torch.float64)
        rows.index_add_(0, owner, products)
        found = torch.zeros(count, count, dtype=torch.float64)
        found.index_add_(1, owner, rows)
        gram += found
    return gram


def plain_gram(parts: Sequence[Sequence[Tensor]]) -> Gram:
    """Inner products of members that are lists of tensors ``[...]`` of equal shapes."""
    rows = []
    for member in parts:
        flat = [tensor.double().flatten() for tensor in member]
        rows.append(torch.cat(flat))
    stack = torch.stack(rows)
    return stack @ stack.T
