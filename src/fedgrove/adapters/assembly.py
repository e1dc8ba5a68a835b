"""What a client runs: terms, how they mix, and the other tensors that train beside them.

Forward of a site: ``W0 x + Σ_terms mix · scale · B (D ⊙ (A x))`` where ``D`` is the term's optional
diagonal. A term of DoRA (``adapter.Dora``) is alone, and is no summand (``magnitude``).

A mix that routes inputs to terms says, in place of a weight, what goes up through B and
for which tokens (``Inner``): the other tokens are not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedgrove.adapters.adapter import Adapter, Dora, Factors, Site, Sites
from fedgrove.adapters.private import seal, unseal
from fedgrove.adapters.tally import Tally
from fedgrove.ground.errors import AdapterError

Home = Literal["server", "client"]


@dataclass(frozen=True, eq=False)
class Term:
    """An adapter in a client's forward pass. It may cover only some of the sites."""

    name: str
    adapter: Adapter
    # which of A, B, M (of DoRA, where it has one) and D (the diagonal) train; "" is frozen
    train: str = "ABM"
    home: Home = "server"  # "client": its trained values come back sealed and cannot travel
    # letters of factors that stay with the client although the term's home is the server (FedSA's
    # B)
    kept: str = ""
    # site -> [rank]; a rank mask (frozen) or FedRoRA's S (trained)
    diagonal: Mapping[str, Tensor] | None = None
    unit: bool = False  # run with unit columns of B and unit rows of A (FedRoRA)
    lr: float = 1.0  # multiplies the job's learning rate
    diagonal_lr: float = 1.0  # multiplies the diagonal's learning rate once more

    def __post_init__(self) -> None:
        unknown = set(self.train) - set("ABMD")
        if unknown:
            raise AdapterError(
                f"Term '{self.name}': train is '{self.train}', expected letters of 'ABMD'."
            )
        if "D" in self.train and self.diagonal is None:
            raise AdapterError(f"Term '{self.name}' trains a diagonal that it does not have.")

    @property
    def private(self) -> str:
        """The letters that cannot travel."""
        if self.home == "client":
            return "ABMD"
        return self.kept

    @property
    def magnified(self) -> bool:
        """Whether it is DoRA's, which is no summand beside the base's own weight."""
        return any(isinstance(factors, Dora) for factors in self.adapter.values())

    def frozen(self) -> Term:
        return replace(self, train="")


@dataclass(frozen=True, eq=False)
class Extra:
    """A trainable (or frozen) tensor beside the terms: head, gate logits, router, module to
    save.
    """

    value: Tensor
    train: bool = True
    home: Home = "client"
    # multiplies the job's learning rate; None: the head's own rate (train.head_lr)
    lr: float | None = 1.0


@dataclass(frozen=True, eq=False)
class Junction:
    """A site in the middle of a forward pass, where the terms' outputs meet: what a mix may go
    by.
    """

    site: Site
    # the site's input [batch, tokens, in]; empty where a linear mix is asked outside a pass
    x: Tensor
    terms: Sequence[str]  # their names, in order
    extras: Mapping[str, Tensor]  # the assembly's, as they train now
    features: Tensor | None = None  # [batch, hidden]
    choice: object = None  # what ``Mix.choose`` made of them
    factors: Sequence[Factors | None] = ()  # the terms' at this site; None where one lacks it
    tally: Tally | None = None  # where a mix that routes notes who runs for whom


@dataclass(frozen=True, eq=False)
class Inner:
    """In place of a weight: what goes up through B for some tokens, instead of weight · D ⊙ (A x).
    ``tokens`` counts a site's inputs ``[batch, tokens, in]`` as one line; the others are not run.
    """

    values: Float[Tensor, "n rank"]
    tokens: Int[Tensor, " n"]


Weight = float | Tensor | Inner


class Mix:
    """How the terms' outputs add up at a site. The base class is the plain sum."""

    #: False where the weights depend on the input, so that no single LoRA adapter computes the same
    linear: bool = True
    #: reads the base's pooled features of each example (``Junction.features`` is then not None)
    needs_features: bool = False
    #: these terms are added to the base, as they are, while it reads them
    features_with: Sequence[str] = ()
    #: sends each input to some of the terms, and notes to which (``Junction.tally``)
    routes: bool = False
    #: the terms run one by one, each with a head of its own, and their probabilities add up
    apart: bool = False

    def choose(
        self,
        features: Float[Tensor, "b hidden"] | None,
        extras: Mapping[str, Tensor],
        examples: int,
    ) -> object:
        """What is settled for a batch before it runs: ``Junction.choice`` at every site."""
        return None

    def weigh(self, at: Junction) -> Sequence[Weight]:
        """One weight per term: a float (0.0: the term is not run), a scalar tensor, a tensor that
        broadcasts over ``[batch, tokens, rank]``, or an ``Inner``.
        """
        return [1.0] * len(at.terms)


@dataclass(frozen=True)
class Weighted(Mix):
    """Fixed weights by term name (1 where not named)."""

    weights: Mapping[str, float]

    def weigh(self, at: Junction) -> Sequence[float]:
        return [self.weights.get(term, 1.0) for term in at.terms]


@dataclass(frozen=True)
class Convex(Mix):
    """``λ · first + (1 − λ) · second`` with one λ per layer, the sigmoid of the extra
    ``{prefix}.{layer}``.

    A layer whose extra is missing is pinned to λ = 1: the second term is not run there.
    """

    first: str
    second: str
    prefix: str = "lambda"

    def weigh(self, at: Junction) -> Sequence[float | Tensor]:
        """One weight per term: 1, or a scalar tensor ``[]`` for the two."""
        name = f"{self.prefix}.{at.site.layer}"
        logit = at.extras.get(name)
        known: dict[str, float | Tensor]
        if logit is None:
            known = {self.second: 0.0}
        else:
            share = torch.sigmoid(logit)
            known = {
                self.second: 1 - share,
                self.first: share,
            }
        return [known.get(term, 1.0) for term in at.terms]


@dataclass(frozen=True, eq=False)
class Assembly:
    """Everything a client runs on the frozen base."""

    terms: tuple[Term, ...] = ()
    mix: Mix = field(default_factory=Mix)
    extras: Mapping[str, Extra] = field(default_factory=dict)
    # a frozen update of the base that every client shares, kept factored
    base_delta: Adapter | None = None
    # like base_delta, but written into (a copy of) the weights while the assembly runs
    folded: Adapter | None = None
    # the transformer layers that exist for this client (FedRA); None: all
    layers: frozenset[int] | None = None

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        different = set(names)
        if len(different) != len(names):
            raise AdapterError(f"An assembly has two terms of one name among {names}.")
        if self.magnified and (len(names) > 1 or self.base_delta or self.folded):
            raise AdapterError(
                f"A term with DoRA's magnitudes scales all that a site gives, so nothing stands "
                f"beside it, and here are {names}."
            )

    @property
    def magnified(self) -> bool:
        """Whether its one term is DoRA's."""
        return any(term.magnified for term in self.terms)

    def term(self, name: str) -> Term:
        for term in self.terms:
            if term.name == name:
                return term
        raise KeyError(name)

    def adapter(self, name: str) -> Adapter:
        """The adapter of the term ``name``."""
        return self.term(name).adapter

    def frozen(self) -> Assembly:
        """The same assembly with nothing to train."""
        terms = tuple(term.frozen() for term in self.terms)
        extras: dict[str, Extra] = {}
        for name, extra in self.extras.items():
            extras[name] = replace(extra, train=False)
        return replace(self, terms=terms, extras=extras)

    def with_extras(self, extras: Mapping[str, Extra]) -> Assembly:
        together = {**self.extras, **extras}
        return replace(self, extras=together)


def trained_parameters(assembly: Assembly) -> int:
    """How many numbers get a gradient."""
    count = 0
    for term in assembly.terms:
        for factors in term.adapter.values():
            for letter, value in factors.tensors.items():
                if letter in term.train:
                    count += value.numel()
        if "D" in term.train:
            count += _of_diagonal(term)
    for extra in assembly.extras.values():
        if extra.train:
            count += extra.value.numel()
    return count


def all_parameters(assembly: Assembly) -> int:
    """How many numbers beside the base the assembly needs to run."""
    adapters = [term.adapter for term in assembly.terms]
    adapters += _frozen_updates(assembly)
    count = 0
    for adapter in adapters:
        for factors in adapter.values():
            count += sum(value.numel() for value in factors.tensors.values())
    for term in assembly.terms:
        count += _of_diagonal(term)
    for extra in assembly.extras.values():
        count += extra.value.numel()
    return count


def _of_diagonal(term: Term) -> int:
    """How many numbers the term's diagonal has."""
    if term.diagonal is None:
        return 0
    return sum(numbers.numel() for numbers in term.diagonal.values())


def _frozen_updates(assembly: Assembly) -> list[Adapter]:
    updates = (assembly.base_delta, assembly.folded)
    return [update for update in updates if update]


def sealed(adapter: Adapter, letters: str = "ABM") -> Adapter:
    """The adapter with the named tensors marked private."""

    def marked(letter: str, value: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        if letter in letters:
            return seal(value)
        return value

    return {name: factors.each(marked) for name, factors in adapter.items()}


def unsealed(adapter: Adapter) -> Adapter:
    return {name: factors.map(unseal) for name, factors in adapter.items()}


def as_one_adapter(assembly: Assembly, sites: Sites) -> Adapter:
    """The one LoRA adapter that computes the same as all terms and the base delta together (exact
    concatenation).

    Everything is folded: weights and scales into B, diagonals and unit norms into both. The result
    has scale 1, and only the sites that some term covers; a term of DoRA stays as it is. Raises
    ``AdapterError`` where the mix depends on the input.
    """
    if not assembly.mix.linear:
        mixed_by = type(assembly.mix).__name__
        raise AdapterError(
            f"The terms are mixed by {mixed_by}, which depends on the input, "
            "so no single LoRA adapter computes the same."
        )
    if assembly.layers is not None:
        raise AdapterError(
            "The client runs a part of the base's layers only, which a LoRA adapter cannot express."
        )
    if assembly.magnified:
        (only,) = assembly.terms
        return unsealed(only.adapter)
    extras: dict[str, Tensor] = {}
    for name, extra in assembly.extras.items():
        extras[name] = unseal(extra.value)
    updates = _frozen_updates(assembly)
    nothing = torch.empty(0)
    result: Adapter = {}
    for site in sites.values():
        found = products(
            site,
            nothing,
            assembly.terms,
            assembly.mix,
            extras,
            updates,
        )
        parts = [product.factors() for product in found]
        if parts:
            result[site.name] = _joined(parts)
    return result


def _joined(parts: Sequence[Factors]) -> Factors:
    """Factors whose product is the sum of the parts'; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    rows = [part.A for part in parts]
    columns = [part.scale * part.B for part in parts]
    return Factors(
        A=torch.cat(rows),
        B=torch.cat(columns, dim=1),
        scale=1.0,
    )


class Product(NamedTuple):
    """One summand of a site's forward, ``weight · scale · B (D ⊙ (A x))``: the formula of this
    package. Whoever computes or exports an assembly goes through one of its three readings.
    """

    term: str | None  # the term's name; None: a frozen update of the base
    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    D: Float[Tensor, " rank"] | None
    scale: float
    weight: Weight  # the mix's

    @property
    def factor(self) -> float | Tensor:
        """All that multiplies the product: a number, or a tensor that broadcasts over ``[batch,
        tokens, rank]``.
        """
        return self.scale * self._number

    @property
    def _number(self) -> float | Tensor:
        """The weight of a mix that runs every token: one number, or it broadcasts over
        ``[batch, tokens, rank]``.
        """
        assert not isinstance(self.weight, Inner)  # only a mix that depends on the input gives one
        return self.weight

    def output(self, x: Float[Tensor, " *batch in"]) -> Float[Tensor, " *batch out"]:
        """The summand. All factors act on the few numbers between A and B, not on the output."""
        inner = F.linear(x, self.A)
        if self.D is not None:
            inner = inner * self.D
        if not _is_one(self.factor):
            inner = inner * self.factor
        return F.linear(inner, self.B)

    def onto(
        self, result: Float[Tensor, " *batch out"], x: Float[Tensor, " *batch in"]
    ) -> Float[Tensor, " *batch out"]:
        """The result with the summand added, for the tokens that it is for. Without gradients it may
        be added in place.
        """
        if not isinstance(self.weight, Inner):
            return result + self.output(x)
        up = F.linear(self.scale * self.weight.values, self.B)
        line = result.flatten(0, -2).to(torch.promote_types(result.dtype, up.dtype))
        if torch.is_grad_enabled():
            line = line.index_add(0, self.weight.tokens, up.to(line.dtype))
        else:
            line.index_add_(0, self.weight.tokens, up.to(line.dtype))
        return line.view(result.shape)

    def folded(self) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """(A, B) with everything else folded into B; for weights that do not depend on x."""
        return self.A, self._up(self.factor)

    def factors(self) -> Factors:
        """The summand as plain factors that keep their scale; for weights that do not depend on
        x.
        """
        return Factors(
            A=self.A,
            B=self._up(self._number).contiguous(),
            scale=self.scale,
        )

    def _up(self, factor: float | Tensor) -> Float[Tensor, "out rank"]:
        if self.D is None:
            B = self.B
        else:
            B = self.B * self.D
        if _is_one(factor):
            return B
        return B * factor


def products(
    site: Site,
    x: Float[Tensor, " *batch in"],
    terms: Sequence[Term],
    mix: Mix,
    extras: Mapping[str, Tensor],
    updates: Sequence[Adapter] = (),
    features: Float[Tensor, "b hidden"] | None = None,
    choice: object = None,
    tally: Tally | None = None,
) -> list[Product]:
    """All that runs at a site beside the base's own weight: the terms in their order, then the
    frozen updates. ``x`` is the site's input; empty where a linear mix is asked outside a pass.
    ``features``, ``choice`` and ``tally`` as in ``Junction``.
    """
    name = site.name
    names = [term.name for term in terms]
    factors = [term.adapter.get(name) for term in terms]
    junction = Junction(
        site,
        x,
        names,
        extras,
        features,
        choice,
        factors,
        tally,
    )
    weights = mix.weigh(junction)
    found: list[Product] = []
    for term, weight in zip(terms, weights, strict=True):
        idle = isinstance(weight, float) and weight == 0.0
        if idle or name not in term.adapter:
            continue
        product = _product(term, name, weight)
        found.append(product)
    for update in updates:
        if name in update:
            frozen = _frozen(update[name])
            found.append(frozen)
    return found


def _product(
    term: Term,
    site: str,
    weight: Weight,
) -> Product:
    """The term's summand, by its weight."""
    factors = term.adapter[site].map(unseal)
    A = factors.A
    B = factors.B
    if term.unit:
        A = unit_rows(A)
        B = unit_rows(B.T).T
    D = None
    if term.diagonal is not None and site in term.diagonal:
        D = unseal(term.diagonal[site])
    return Product(
        term.name,
        A,
        B,
        D,
        factors.scale,
        weight,
    )


def _frozen(update: Factors) -> Product:
    """The summand of a frozen update of the base."""
    factors = update.map(unseal)
    return Product(
        term=None,
        A=factors.A,
        B=factors.B,
        D=None,
        scale=factors.scale,
        weight=1.0,
    )


def _is_one(factor: float | Tensor) -> bool:
    """Whether it is the number 1; a tensor ``[batch, tokens, 1]`` never is."""
    return isinstance(factor, float) and factor == 1.0


def unit_rows(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Rows divided by their Euclidean norm; a zero row stays zero."""
    tiny = torch.finfo(matrix.dtype).tiny
    norms = matrix.norm(dim=1, keepdim=True)
    return matrix / norms.clamp_min(tiny)
