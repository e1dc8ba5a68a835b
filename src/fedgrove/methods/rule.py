"""A method's server rule, stated once: factors of one site of all clients in, factors out.

A method that states a rule names its class in the attribute ``Rule``; its ``aggregate`` calls it in
a run (``combine``), and ``fedgrove aggregate`` calls it on PEFT directories, in float64 and one
site at a time. A method without one says why in ``no_rule``.

A rule is any class that satisfies ``ServerRule``. What only some rules have are protocols of their
own: a pass over all sites before the last (``FirstPass``), weights that it finds by itself
(``OwnWeights``), what it found out (``Finds``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, Site, Sites
from fedgrove.adapters.algebra import Indices, check, pad
from fedgrove.adapters.centre import active, shares_of, weighed
from fedgrove.ground.errors import AdapterError
from fedgrove.ground.plain import Plain
from fedgrove.methods.contract import Method, Setting


@dataclass(frozen=True)
class Round:
    """What a rule knows before it sees any factors."""

    sites: Sites  # shallow to deep
    number: int = 1  # of the round, from 1
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Arrived:
    """One site as it arrived from all clients of the round, in one order throughout."""

    site: Site
    factors: Sequence[Factors]
    weights: Sequence[float]  # not negative; they add up to 1
    rank: int  # of the global factors, where the rule can choose it
    scale: float  # of the global factors, where the clients' scales differ
    previous: Factors | None = None  # the last global factors
    #: per client, the global rank indices of its rows, ascending; None: the first r_i
    indices: Sequence[Sequence[int]] | None = None
    #: [rows, in]: what a direction that the mean does not have starts from; None: any
    start: Tensor | None = None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def adapters(self) -> list[Adapter]:
        """The clients' factors as adapters of this one site, for the algebra of adapters."""
        return [{self.name: each} for each in self.factors]

    def old(self, least: int) -> Factors:
        """The last global factors with at least so many modules; zeros where there are none."""
        if self.previous is None:
            return self.factors[0].zeros(least, self.scale)
        if self.previous.rank >= least:
            return self.previous
        return pad({self.name: self.previous}, least)[self.name]


@dataclass(frozen=True, eq=False)
class Outcome:
    """One site after the round."""

    whole: Factors | None = None  # the global factors
    own: Sequence[Factors] | None = None  # each client's, at the rank and scale that it has
    base: Factors | None = None  # what all merge into the frozen base

    def __post_init__(self) -> None:
        if self.whole is None and self.own is None and self.base is None:
            raise AdapterError("A rule gave nothing for a site: give whole, own or base.")


@dataclass(frozen=True)
class Needs:
    """What a rule needs of adapter directories that anyone wrote, and may be told about them."""

    equal_ranks: bool = False
    equal_scales: bool = False  # a mean of factors is undefined for unequal ones
    frozen: Literal["", "A", "B"] = ""  # the factor that must be one for all clients
    magnitudes: bool = False  # DoRA's have a rule too: the mean of each tensor
    every_weight: bool = False  # a weight of 0 would leave somebody without a mean
    rank: bool = False  # the global rank can be chosen
    previous: bool = False  # it refers to the last global factors
    rounds: bool = False  # it differs by round, and from the second on needs ``previous``
    seed: bool = False
    #: where each rank index is averaged over its holders: a client holds the "first" r_i, or those
    #: that it is "tagged" with
    by_index: Literal["", "first", "tagged"] = ""
    options: tuple[str, ...] = ()  # the method's own keys that the rule reads


class ServerRule(Protocol):
    """Made anew for each round."""

    needs: ClassVar[Needs]

    def __init__(self, options: Any, round: Round) -> None: ...

    def site(self, given: Arrived) -> Outcome:
        """One site after the round. Asked once for each, shallow to deep."""


@runtime_checkable
class FirstPass(Protocol):
    """A rule that must have seen all sites before it can give the first."""

    def look(self, given: Arrived) -> None:
        """Asked once for each site, shallow to deep, before the first ``site``. May refuse."""


@runtime_checkable
class OwnWeights(Protocol):
    """A rule that does not take the weights as they are."""

    @property
    def measure(self) -> str:
        """What it weighs clients by, in words; "" where it takes the weights given after all."""

    def weights(self, given: Sequence[float]) -> list[float]:
        """The weights of the round, after the first pass."""


@runtime_checkable
class Finds(Protocol):
    """A rule that finds out more than factors."""

    def notes(self) -> list[str]:
        """What the user should know, in sentences."""

    def artefacts(self, clients: Sequence[str]) -> Plain:
        """Plain data by file name; ``clients``: their names."""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """A round's whole adapters, walked site by site. ``rank`` and ``scale``: the job's, if None."""

    setting: Setting
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    rank: Mapping[str, int] | int | None = None
    scale: float | None = None
    previous: Adapter | None = None
    indices: Sequence[Indices] | None = None
    start: Adapter | None = None

    def __iter__(self) -> Iterator[Arrived]:
        for name in self.adapters[0]:
            if name not in self.setting.sites:
                raise AdapterError(f"Site '{name}' is none of the job's: send its targets alone.")
            yield Arrived(
                self.setting.sites[name],
                [adapter[name] for adapter in self.adapters],
                self.weights,
                self._rank(name),
                self._scale(),
                None if self.previous is None else self.previous[name],
                None if self.indices is None else [_at(each, name) for each in self.indices],
                None if self.start is None else self.start[name].A,
            )

    def _rank(self, site: str) -> int:
        if isinstance(self.rank, Mapping):
            return self.rank[site]
        return self.rank or self.setting.rank

    def _scale(self) -> float:
        return self.scale or self.setting.scale(self.setting.rank)


@dataclass(frozen=True, eq=False)
class Combined:
    """What a rule made of all sites; a site is only in the part that the rule gave for it."""

    whole: Adapter
    base: Adapter


def prepared(
    rule: ServerRule,
    arrivals: Iterable[Arrived],
    weights: Sequence[float],
) -> Sequence[float]:
    """Do the first pass, where the rule has one; gives the weights that it takes."""
    if isinstance(rule, FirstPass):
        for given in arrivals:
            rule.look(given)
    if isinstance(rule, OwnWeights):
        return rule.weights(weights)
    return weights


def combine(rule: ServerRule, arrivals: Arrivals) -> Combined:
    """A round of a run: both passes of the rule over whole adapters.

    AdapterError for adapters that do not fit together.
    """
    check(arrivals.adapters, dora=rule.needs.magnitudes)
    weights = prepared(rule, arrivals, arrivals.weights)
    # an index has holders of its own, so that it is judged by itself
    if active() is None or arrivals.indices is not None:
        return _sites(rule, replace(arrivals, weights=weights))
    weights = shares_of(arrivals.adapters, weights)
    with weighed():
        return _sites(rule, replace(arrivals, weights=weights))


def _sites(rule: ServerRule, arrivals: Arrivals) -> Combined:
    """The last pass of a rule."""
    whole: Adapter = {}
    base: Adapter = {}
    for given in arrivals:
        outcome = rule.site(given)
        if outcome.whole is not None:
            whole[given.name] = outcome.whole
        if outcome.base is not None:
            base[given.name] = outcome.base
    return Combined(whole, base)


def stated(kind: type) -> type[ServerRule] | str:
    """The rule that a method class states, or, as a clause, why it has none.

    The nearest class of its ancestry that says either decides. A rule is not inherited by a class
    that aggregates in a way of its own, which may not be the rule's.
    """
    for each in kind.__mro__:
        own = vars(each)
        if "Rule" in own:
            rule: type[ServerRule] = own["Rule"]
            return rule
        if "no_rule" in own:
            return str(own["no_rule"])
        if "aggregate" in own and not hasattr(kind, "no_rule"):
            break
    return "it states none for directories (a class attribute Rule)"


def takes_magnitudes(kind: type[Method]) -> bool:
    """Whether DoRA's magnitudes have a rule with a method class: its server's, or none is needed."""
    rule = stated(kind)
    if isinstance(rule, str):
        return not kind.federated
    return rule.needs.magnitudes


def _at(indices: Indices, site: str) -> Sequence[int]:
    if isinstance(indices, Mapping):
        return indices[site]
    return indices
