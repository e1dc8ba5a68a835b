"""Several clients in one batch on the one base: each keeps its own terms, data order, loss and
optimiser state.

What a member computes is what it would compute alone, up to rounding: the base sees one large
batch, every member's terms see that member's part of it, the losses are added up, and so each
gradient is that of its own loss. A large batch is what keeps a device busy when clients' own
batches are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.assembly import Product
from fedgrove.adapters.private import unseal
from fedgrove.training.live import Inputs, LiveAssembly, Outputs
from fedgrove.training.packed import Layout

#: for each block its rank and the numbers of the members that run it
Belongs = tuple[tuple[int, tuple[int, ...]], ...]


class Cohort:
    """Each member's terms on its ``rows`` of the batch.

    All members' factors stand side by side in two large products, between which what belongs to
    others is set to zero: a few calls instead of a few for each member, and ranks may differ.
    Frozen factors that several members have in common (an earlier tier, an update of the base)
    stand there once. They run in the base's precision, as under autocast; the masters that the
    optimiser moves keep theirs. Members run part after part where one has more than such
    products: a ``base_delta`` that has become a dense matrix, or DoRA's magnitudes.
    """

    packs = True

    def __init__(self, lives: Sequence[LiveAssembly], rows: Sequence[int]):
        self.lives = list(lives)
        self.rows = list(rows)
        self.enter(None)

    def enter(self, layout: Layout | None) -> None:
        """As in Running: how much of a batch, or of a packed row, each member has."""
        self._axis = 0
        self._sizes = list(self.rows)
        if layout is not None:
            self._axis = 1
            self._sizes = _tokens(layout, self.rows)
        self._x: Tensor | None = None  # the last site's input, and its members' parts
        self._parts: Sequence[Tensor] = ()
        self._masks: dict[Belongs, Tensor] = {}

    def add(
        self,
        site: Site,
        x: Inputs,
        output: Outputs,
    ) -> Outputs:
        """The site's output with every member's terms added to its part."""
        if not all(live.summed(site) for live in self.lives):
            return self._add_in_turn(site, x, output)
        return self._add_masked(site, x, output)

    def _add_in_turn(
        self,
        site: Site,
        x: Inputs,
        output: Outputs,
    ) -> Outputs:
        if x is not self._x:
            self._x = x
            self._parts = x.split(self._sizes, self._axis)
        outputs = output.split(self._sizes, self._axis)
        parts = zip(self.lives, self._parts, outputs, strict=True)
        found = [live.add(site, own, out) for live, own, out in parts]
        return torch.cat(found, self._axis)

    def _add_masked(
        self,
        site: Site,
        x: Inputs,
        output: Outputs,
    ) -> Outputs:
        blocks = self._blocks(site, x)
        if not blocks:
            return output
        down = torch.cat([block.A for block in blocks]).to(x.dtype)
        up = torch.cat([block.B for block in blocks], 1)
        turned = up.T.to(output.dtype)
        belongs = tuple(block.belongs for block in blocks)
        inner = F.linear(x, down) * self._mask(belongs, x)
        inner = inner.flatten(0, -2).to(output.dtype)
        more = torch.addmm(output.flatten(0, -2), inner, turned)
        return more.view(output.shape)

    def _blocks(self, site: Site, x: Inputs) -> list[Block]:
        """All that runs at a site; what several members have in common, once."""
        found: dict[object, Block] = {}
        for number, live in enumerate(self.lives):
            for product in live.products(site, x):
                mark = _mark(product, site, live)
                if mark is None:
                    mark = (number, product.term)
                if mark not in found:
                    A, B = product.folded()
                    found[mark] = Block(A, B)
                block = found[mark]
                block.members.append(number)
        return list(found.values())

    def _mask(self, belongs: Belongs, x: Inputs) -> Float[Tensor, "_ _ ranks"]:
        """1 where a row's (packed: a token's) member has a block; [b, 1, ranks], packed [1, n,
        ranks].
        """
        if belongs not in self._masks:
            has = torch.zeros(len(self.lives), len(belongs), dtype=x.dtype)
            for column, (_, members) in enumerate(belongs):
                rows = list(members)
                has[rows, column] = 1
            ranks = torch.tensor([rank for rank, _ in belongs])
            sizes = torch.tensor(self._sizes)
            wide = has.repeat_interleave(ranks, 1)
            mask = wide.repeat_interleave(sizes, 0).to(x.device)
            self._masks[belongs] = mask.unsqueeze(1 - self._axis)
        return self._masks[belongs]


@dataclass(eq=False)
class Block:
    """Factors side by side with others', scales and weights in B, and who they run for."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    members: list[int] = field(default_factory=list)

    @property
    def belongs(self) -> tuple[int, tuple[int, ...]]:
        """Its rank, and the numbers of its members."""
        return len(self.A), tuple(self.members)


def _tokens(layout: Layout, rows: Sequence[int]) -> list[int]:
    """How many tokens of a packed row each member has; the spare ones are the last member's."""
    lengths: Iterator[int] = iter(layout.lengths)
    sizes = [sum(islice(lengths, count)) for count in rows]
    sizes[-1] += layout.spare
    return sizes


def _mark(product: Product, site: Site, live: LiveAssembly) -> tuple[object, ...] | None:
    """What is equal where two members run the same frozen numbers in the same place; None where
    the product is the member's own.
    """
    if product.term is None:
        updates = live.assembly.base_delta or {}
        return ("update", *_memory(updates[site.name]), product.factor)
    term = live.assembly.term(product.term)
    trains = set("AB") & set(term.train)
    if trains or product.D is not None or not isinstance(product.factor, float):
        return None
    given = term.adapter[site.name]
    return (term.name, *_memory(given), term.unit, product.factor)


def _memory(factors: Factors) -> tuple[object, ...]:
    """What two pairs of factors that are the same numbers in the same place have in common."""
    found: list[object] = []
    for value in (factors.A, factors.B):
        tensor = unseal(value)
        found += [tensor.data_ptr(), tensor.shape, tensor.stride()]
    return tuple(found)
