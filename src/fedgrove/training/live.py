"""An assembly as it runs: tensors on the device, leaves that train, and the sum at each site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, Site
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Term, sealed, unit_rows
from fedgrove.adapters.private import seal, unseal
from fedgrove.methods.contract import Live


@dataclass(eq=False)
class LiveTerm:
    """A term whose tensors are on the device, in the adapters' precision."""

    term: Term
    adapter: Adapter
    diagonal: dict[str, Tensor]

    def factors(self, site: str) -> tuple[Tensor, Tensor]:
        """A and B as they run."""
        A, B = self.adapter[site].A, self.adapter[site].B
        return (unit_rows(A), unit_rows(B.T).T) if self.term.unit else (A, B)

    def output(self, site: str, x: Tensor, weight: float | Tensor) -> Tensor:
        """``weight · scale · B (D ⊙ (A x))``; x ``[batch, tokens, in]``."""
        A, B = self.factors(site)
        inner = F.linear(x, A)
        if site in self.diagonal:
            inner = inner * self.diagonal[site]
        factor = (
            self.adapter[site].scale * weight
        )  # on the few numbers between A and B, not on the site's output
        return F.linear(inner if isinstance(factor, float) and factor == 1.0 else inner * factor, B)


class Product(NamedTuple):
    """What runs at a site, ``B A x``: A [r, in] and B [out, r], in which diagonal, scale and weight
    are.
    """

    term: LiveTerm | None  # None: the update of the base
    factor: float | Tensor  # scale and weight
    A: Tensor
    B: Tensor


@dataclass(eq=False)
class LiveDelta:
    """A frozen update of the base: factored while that is cheaper than the dense matrix."""

    adapter: Adapter
    dense: dict[str, Tensor]

    def output(self, site: str, x: Tensor) -> Tensor:
        if site in self.dense:
            return F.linear(x, self.dense[site])
        factors = self.adapter[site]
        return factors.scale * F.linear(F.linear(x, factors.A), factors.B)


class LiveAssembly:
    """An assembly on the device. ``leaves`` are what the optimiser sees."""

    def __init__(
        self,
        assembly: Assembly,
        *,
        device: torch.device,
        dtype: torch.dtype,
        train: bool,
        dropout: float = 0.0,
    ):
        self.assembly = assembly
        self.device, self.dtype = device, dtype
        self.dropout = dropout if train else 0.0
        self.features: Tensor | None = None
        self._x: Tensor | None = (
            None  # the last site's input, and the same in the adapters' precision
        )
        self._inner: Tensor | None = None
        self.groups: dict[
            float | None, list[Tensor]
        ] = {}  # learning-rate multiplier (None: the head's own) -> leaves
        self.terms = [self._term(term, train) for term in assembly.terms]
        self.names = [term.name for term in assembly.terms]
        self.extras = {name: self._extra(extra, train) for name, extra in assembly.extras.items()}
        self.delta = self._delta(assembly.base_delta) if assembly.base_delta else None
        self._whole: dict[str, tuple[Tensor, Tensor] | None] | None = None if train else {}

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for group in self.groups.values() for leaf in group]

    @property
    def head(self) -> dict[str, Tensor]:
        """The head's tensors by their own names."""
        return {
            name.removeprefix("head."): value
            for name, value in self.extras.items()
            if name.startswith("head.")
        }

    def seen(self) -> Live:
        """What a penalty sees."""
        return Live({live.term.name: live.adapter for live in self.terms}, self.extras)

    def weighed(self, site: Site, x: Tensor) -> list[tuple[LiveTerm, float | Tensor]]:
        """The terms that run at a site whose input is x, and their weights."""
        weights = self.assembly.mix.weigh(Junction(site, x, self.names, self.extras, self.features))
        return [
            (live, weight)
            for live, weight in zip(self.terms, weights, strict=True)
            if site.name in live.adapter and not (isinstance(weight, float) and weight == 0.0)
        ]

    def products(self, site: Site, x: Tensor) -> Iterator[Product]:
        """All that a mix with fixed weights adds at a site, but for an update that has become a
        dense matrix.
        """
        for live, weight in self.weighed(site, x):
            A, B = live.factors(site.name)
            factor = live.adapter[site.name].scale * weight
            if site.name in live.diagonal:
                B = B * live.diagonal[site.name]
            yield Product(
                live, factor, A, B if isinstance(factor, float) and factor == 1.0 else B * factor
            )
        if self.delta is not None and site.name in self.delta.adapter:
            update = self.delta.adapter[site.name]
            yield Product(None, update.scale, update.A, update.scale * update.B)

    def add(self, site: Site, x: Tensor, output: Tensor) -> Tensor:
        """The site's output with every term added: ``W0 x + Σ mix · scale · B (D ⊙ (A x))``."""
        name = site.name
        dense = self.delta is not None and name in self.delta.dense
        if (
            self._whole is not None
            and self.assembly.mix.linear
            and not dense
            and not torch.is_grad_enabled()
        ):
            return self._add_at_once(site, x, output)
        if x is not self._x:  # sites that share an input (query and value) share its conversion
            self._x, self._inner = x, x.to(self.dtype)
        inner = cast(Tensor, self._inner)
        result = output
        if self.delta is not None and (name in self.delta.adapter):
            result = result + self.delta.output(name, inner)
        dropped = F.dropout(inner, self.dropout, training=True) if self.dropout else inner
        for live, weight in self.weighed(site, inner):
            result = result + live.output(
                name, dropped, weight
            )  # in the wider of the two precisions
        return result.to(output.dtype)

    def _add_at_once(self, site: Site, x: Tensor, output: Tensor) -> Tensor:
        """``add`` where nothing trains: all terms in one product, in the base's precision, onto the
        output in place.
        """
        assert self._whole is not None
        if site.name not in self._whole:
            products = list(self.products(site, x))
            self._whole[site.name] = None
            if products:
                A = torch.cat([product.A for product in products])
                B = torch.cat([product.B for product in products], 1)
                self._whole[site.name] = (A.to(x.dtype), B.T.to(output.dtype).contiguous())
        whole = self._whole[site.name]
        if whole is not None:
            inner = F.linear(x, whole[0]).flatten(0, -2).to(output.dtype)
            output = output.contiguous()  # what is not would be flattened into a copy
            output.flatten(0, -2).addmm_(inner, whole[1])
        return output

    def trained(self) -> Assembly:
        """The assembly with the values as they are now, on the CPU; client-home ones sealed."""
        terms = tuple(self._trained_term(live) for live in self.terms)
        extras: dict[str, Extra] = {}
        for name, extra in self.assembly.extras.items():
            value = self.extras[name].detach().cpu().clone() if extra.train else extra.value
            extras[name] = replace(extra, value=seal(value) if extra.home == "client" else value)
        return replace(self.assembly, terms=terms, extras=extras)

    def _trained_term(self, live: LiveTerm) -> Term:
        term = live.term
        if not term.train:
            return (
                replace(term, adapter=sealed(term.adapter, term.private)) if term.private else term
            )
        adapter = {
            name: Factors(
                A=f.A.detach().cpu().clone() if "A" in term.train else term.adapter[name].A,
                B=f.B.detach().cpu().clone() if "B" in term.train else term.adapter[name].B,
                scale=f.scale,
            )
            for name, f in live.adapter.items()
        }
        diagonal = term.diagonal
        if diagonal is not None and "D" in term.train:
            diagonal = {name: value.detach().cpu().clone() for name, value in live.diagonal.items()}
            if "D" in term.private:
                diagonal = {name: seal(value) for name, value in diagonal.items()}
        return replace(term, adapter=sealed(adapter, term.private), diagonal=diagonal)

    def _place(self, value: Tensor, leaf: bool, group: float | None) -> Tensor:
        placed = unseal(value).detach().to(self.device, self.dtype)
        if leaf:
            placed = placed.clone().requires_grad_()
            self.groups.setdefault(group, []).append(placed)
        return placed

    def _term(self, term: Term, train: bool) -> LiveTerm:
        letters = term.train if train else ""
        adapter = {
            name: Factors(
                A=self._place(f.A, "A" in letters, term.lr),
                B=self._place(f.B, "B" in letters, term.lr),
                scale=f.scale,
            )
            for name, f in term.adapter.items()
        }
        diagonal = {
            name: self._place(d, "D" in letters, term.lr)
            for name, d in (term.diagonal or {}).items()
        }
        return LiveTerm(term, adapter, diagonal)

    def _extra(self, extra: Extra, train: bool) -> Tensor:
        return self._place(extra.value, train and extra.train, extra.lr)

    def _delta(self, delta: Mapping[str, Factors]) -> LiveDelta:
        factored: Adapter = {}
        dense: dict[str, Tensor] = {}
        for name, factors in delta.items():
            placed = factors.map(lambda value: self._place(value, False, 1.0))
            factored[name] = placed
            rows, columns = placed.B.shape[0], placed.A.shape[1]
            if placed.rank * (rows + columns) > rows * columns:
                dense[name] = placed.product()
        return LiveDelta(factored, dense)
