"""An assembly as it runs: tensors on the device, leaves that train, and the sum at each site."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Dora, Factors, Site
from fedgrove.adapters.assembly import Assembly, Extra, Product, Term, products, sealed
from fedgrove.adapters.magnitude import Frozen, gains, magnified
from fedgrove.adapters.private import seal, unseal
from fedgrove.adapters.tally import Tally
from fedgrove.methods.contract import Live
from fedgrove.training.packed import Layout

#: What a site is given and what it gives, with what stands in front of the features.
Inputs = Float[Tensor, "*rows in"]
Outputs = Float[Tensor, "*rows out"]


def _with_gradient(value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return value.requires_grad_()


class Running(Protocol):
    """What the base's hooks add while a batch runs: one client's assembly, or a cohort's."""

    @property
    def packs(self) -> bool:
        """Whether it may run on a packed row, where an example is no row of its own."""

    def enter(self, layout: Layout | None) -> None:
        """A batch begins; with a layout it runs as one packed row."""

    def add(
        self,
        site: Site,
        x: Inputs,
        output: Outputs,
    ) -> Outputs:
        """The site's output with what runs there added to it."""


@dataclass(frozen=True, eq=False)
class Delta:
    """A frozen update of the base: factored while that is cheaper than the dense matrix."""

    factored: Adapter
    dense: Mapping[str, Float[Tensor, "out in"]]


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
        frozen: Callable[[Site], Frozen] | None = None,
    ):
        """``frozen``: the base's own layer at a site, for terms that are more than summands."""
        self.assembly = assembly
        self.device = device
        self.dtype = dtype
        self.dropout = dropout * train  # none where nothing trains
        #: pooled features of the batch's examples [b, hidden], where the mix reads them
        self.features: Float[Tensor, "b hidden"] | None = None
        #: what the mix settled for the batch, and who runs for whom in it
        self.choice: object = None
        self.tally: Tally | None = None
        #: learning-rate multiplier (None: the head's own) -> leaves
        self.groups: dict[float | None, list[Tensor]] = {}
        self.terms = [self._term(term, train) for term in assembly.terms]
        self.extras: dict[str, Tensor] = {}
        for name, extra in assembly.extras.items():
            leaf = train and extra.train
            self.extras[name] = self._place(extra.value, leaf, extra.lr)
        self.delta = self._delta(assembly.base_delta or {})
        # sites that share an input (query and value) share its conversion
        self._x: Tensor | None = None
        self._converted: Tensor | None = None
        # where nothing trains: all that a site adds as one product, made once
        self._train = train
        self._whole: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._frozen = frozen
        self._gains: dict[str, Tensor] = {}

    @property
    def packs(self) -> bool:
        """As in Running: a weight that depends on the input may be that of an example."""
        return self.assembly.mix.linear

    @property
    def leaves(self) -> list[Tensor]:
        """All tensors [any shape] that train, group by group."""
        found: list[Tensor] = []
        for group in self.groups.values():
            found.extend(group)
        return found

    @property
    def head(self) -> dict[str, Tensor]:
        """The head's tensors by their own names, as ``{"weight": [c, h], "bias": [c]}``."""
        found: dict[str, Tensor] = {}
        for name, value in self.extras.items():
            if name.startswith("head."):
                found[name.removeprefix("head.")] = value
        return found

    @property
    def heads(self) -> list[dict[str, Tensor]]:
        """A head for each term, as ``head`` has one, from extras ``heads.NUMBER.NAME``; [] where
        there is one head for all.
        """
        found: dict[int, dict[str, Tensor]] = {}
        for name, value in self.extras.items():
            if name.startswith("heads."):
                _, number, own = name.split(".", 2)
                found.setdefault(int(number), {})[own] = value
        return [found[number] for number in sorted(found)]

    def seen(self) -> Live:
        """What a penalty sees."""
        adapters = {term.name: term.adapter for term in self.terms}
        return Live(adapters, self.extras)

    def enter(self, layout: Layout | None) -> None:
        """As in Running. An assembly alone adds the same to every row."""

    def begin(self, examples: int, mask: Bool[Tensor, "b t"] | None) -> None:
        """A batch of so many examples begins, whose features are known; ``mask`` [b, t]: its tokens
        that are no padding.
        """
        mix = self.assembly.mix
        self.tally = None
        if mix.routes:
            self.tally = Tally(examples, mask)
        self.choice = mix.choose(self.features, self.extras, examples)

    # -------------------------------------------------------------------- forward
    def products(self, site: Site, x: Inputs) -> list[Product]:
        """What runs at a site whose input is x, but for an update that has become a dense
        matrix.
        """
        updates: list[Adapter] = []
        if site.name not in self.delta.dense:
            updates.append(self.delta.factored)
        return products(
            site=site,
            x=x,
            terms=self.terms,
            mix=self.assembly.mix,
            extras=self.extras,
            updates=updates,
            features=self.features,
            choice=self.choice,
            tally=self.tally,
        )

    def add(
        self,
        site: Site,
        x: Inputs,
        output: Outputs,
    ) -> Outputs:
        """The site's output with every product added, in the wider of the base's and the adapters'
        precision.
        """
        dora = self.dora(site)
        if dora is not None:
            return self._add_magnified(dora, site, x, output)
        dense = self.delta.dense.get(site.name)
        if dense is None and self._foldable:
            return self._add_at_once(site, x, output)
        x = self._in_adapters_precision(x)
        result = output
        if dense is not None:
            result = result + F.linear(x, dense)
        dropped = x
        if self.dropout:
            dropped = F.dropout(x, self.dropout, training=True)
        terms = []
        for product in self.products(site, x):
            if product.term is None:  # an update of the base
                result = result + product.output(x)
            else:
                terms.append(product)
        for product in terms:
            result = product.onto(result, dropped)
        return result.to(output.dtype)

    def dora(self, site: Site) -> Dora | None:
        """What runs at the site, where it is DoRA's."""
        for term in self.terms:  # one, as Assembly says
            factors = term.adapter.get(site.name)
            if isinstance(factors, Dora):
                return factors
        return None

    def summed(self, site: Site) -> bool:
        """Whether all that runs at a site are products of factors, beside which others can stand."""
        return site.name not in self.delta.dense and self.dora(site) is None

    def _add_magnified(
        self,
        dora: Dora,
        site: Site,
        x: Inputs,
        output: Outputs,
    ) -> Outputs:
        """``add`` of DoRA's term. Where nothing trains its gains are worked out once."""
        assert self._frozen is not None  # whoever runs DoRA says what it scales
        layer = self._frozen(site)
        if self._train:
            gain = gains(dora, layer)
        else:
            if site.name not in self._gains:
                self._gains[site.name] = gains(dora, layer)
            gain = self._gains[site.name]
        found = magnified(dora, gain, layer.bias, self._in_adapters_precision(x), output)
        return found.to(output.dtype)

    @property
    def _foldable(self) -> bool:
        return not self._train and self.assembly.mix.linear and not torch.is_grad_enabled()

    def _in_adapters_precision(self, x: Inputs) -> Inputs:
        if x is not self._x or self._converted is None:
            self._x = x
            self._converted = x.to(self.dtype)
        return self._converted

    def _add_at_once(
        self,
        site: Site,
        x: Inputs,
        output: Outputs,
    ) -> Outputs:
        """``add`` where nothing trains: all products as one, in the base's precision, onto the
        output in place.
        """
        if site.name not in self._whole:
            self._whole[site.name] = self._joined(site, x, output)
        whole = self._whole[site.name]
        if whole is None:
            return output
        down, up = whole
        inner = F.linear(x, down).flatten(0, -2)
        output = output.contiguous()  # what is not would be flattened into a copy
        flat = output.flatten(0, -2)
        flat.addmm_(inner.to(output.dtype), up)
        return output

    def _joined(
        self,
        site: Site,
        x: Inputs,
        output: Outputs,
    ) -> tuple[Float[Tensor, "ranks in"], Float[Tensor, "ranks out"]] | None:
        """All products side by side in the base's precision; None where there are none."""
        pairs = [product.folded() for product in self.products(site, x)]
        if not pairs:
            return None
        down = torch.cat([A for A, _ in pairs])
        up = torch.cat([B for _, B in pairs], 1)
        turned = up.T.to(output.dtype)
        return down.to(x.dtype), turned.contiguous()

    def part(self, names: Sequence[str]) -> LiveAssembly | None:
        """The terms of these names alone, added up as they are now; None where there are none."""
        terms = [term for term in self.terms if term.name in names]
        if not terms:
            return None
        plain = Assembly(tuple(terms))
        return LiveAssembly(
            plain,
            device=self.device,
            dtype=self.dtype,
            train=False,
        )

    def copy(self, made: Callable[[Tensor], Tensor] = _with_gradient) -> LiveAssembly:
        """The same numbers in the same place, with gradients of their own; ``made`` makes a leaf of
        a detached tensor [any shape].
        """
        other = copy.copy(self)
        own: dict[Tensor, Tensor] = {}

        def leaf(value: Tensor) -> Tensor:
            """[any shape] -> the copy's leaf; what is frozen is shared."""
            if not value.requires_grad:
                return value
            own[value] = made(value.detach())
            return own[value]

        other.terms = [_mapped(term, leaf) for term in self.terms]
        other.extras = {name: leaf(value) for name, value in self.extras.items()}
        other.groups = {}
        for rate, leaves in self.groups.items():
            other.groups[rate] = [own[value] for value in leaves]
        return other

    # -------------------------------------------------------------------- results
    def trained(self) -> Assembly:
        """The assembly with the values as they are now, on the CPU; client-home ones sealed."""
        pairs = zip(self.assembly.terms, self.terms, strict=True)
        terms = [_trained(before, after) for before, after in pairs]
        extras: dict[str, Extra] = {}
        for name, extra in self.assembly.extras.items():
            value = extra.value
            if extra.train:
                value = _taken(self.extras[name])
            if extra.home == "client":
                value = seal(value)
            extras[name] = replace(extra, value=value)
        return replace(self.assembly, terms=tuple(terms), extras=extras)

    # ------------------------------------------------------------------ placement
    def _place(
        self,
        value: Float[Tensor, "*any"],
        leaf: bool,
        group: float | None,
    ) -> Tensor:
        """On the device in the adapters' precision; a leaf is a copy that gets gradients."""
        frozen = unseal(value).detach()
        placed = frozen.to(self.device, self.dtype)
        if leaf:
            placed = placed.clone().requires_grad_()
            leaves = self.groups.setdefault(group, [])
            leaves.append(placed)
        return placed

    def _term(self, term: Term, train: bool) -> Term:
        letters = ""
        if train:
            letters = term.train
        adapter: Adapter = {}

        def placed(letter: str, value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
            return self._place(value, letter in letters, term.lr)

        for site, factors in term.adapter.items():
            adapter[site] = factors.each(placed)
        diagonal: dict[str, Tensor] = {}
        rate = term.lr * term.diagonal_lr
        for site, values in _diagonal(term).items():
            diagonal[site] = self._place(values, "D" in letters, rate)
        return replace(term, adapter=adapter, diagonal=diagonal)

    def _delta(self, delta: Mapping[str, Factors]) -> Delta:
        factored: Adapter = {}
        dense: dict[str, Tensor] = {}

        def frozen(value: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
            return self._place(value, False, 1.0)

        for name, factors in delta.items():
            placed = factors.map(frozen)
            factored[name] = placed
            rows = placed.B.shape[0]
            columns = placed.A.shape[1]
            if placed.rank * (rows + columns) > rows * columns:
                dense[name] = placed.product()
        return Delta(factored, dense)


def _diagonal(term: Term) -> Mapping[str, Float[Tensor, " rank"]]:
    """The term's diagonal by site; empty where it has none."""
    return term.diagonal or {}


def _mapped(term: Term, change: Callable[[Tensor], Tensor]) -> Term:
    """The term with ``change`` applied to every tensor [any shape]."""
    adapter = {site: factors.map(change) for site, factors in term.adapter.items()}
    diagonal = {site: change(values) for site, values in _diagonal(term).items()}
    return replace(term, adapter=adapter, diagonal=diagonal)


def _trained(before: Term, after: Term) -> Term:
    """The term with what trained, on the CPU, and sealed where it cannot travel."""
    if not before.train:
        if not before.private:
            return before
        return replace(before, adapter=sealed(before.adapter, before.private))
    adapter = {
        site: _taken_letters(before.adapter[site], factors, before.train)
        for site, factors in after.adapter.items()
    }
    diagonal = before.diagonal
    if diagonal is not None and "D" in before.train:
        diagonal = {site: _taken(values) for site, values in _diagonal(after).items()}
        if "D" in before.private:
            diagonal = {site: seal(values) for site, values in diagonal.items()}
    own = sealed(adapter, before.private)
    return replace(before, adapter=own, diagonal=diagonal)


def _taken_letters(before: Factors, after: Factors, letters: str) -> Factors:
    """The factors as they were, with what of these letters trained."""

    def newest(letter: str, value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        if letter in letters:
            return _taken(after.tensors[letter])
        return value

    return before.each(newest)


def _taken(leaf: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """What a leaf holds now, as a copy on the CPU."""
    return leaf.detach().cpu().clone()
