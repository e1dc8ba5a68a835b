"""The clients' directories as a rule sees them: one site at a time, in float64, checked before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.algebra import rescale
from fedgrove.adapters.lowrank import lean
from fedgrove.adapters.noise import Noise, aggregation_noise, index_aggregation_noise
from fedgrove.aggregate.inputs import Source
from fedgrove.aggregate.options import rules
from fedgrove.aggregate.tags import Tags
from fedgrove.ground.errors import AdapterError
from fedgrove.interop.peft import CONFIG
from fedgrove.methods.rule import Arrived, Needs, Outcome

#: What is below this share of the sum of the clients' updates is the rounding of float64.
_ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class Directories:
    """One aggregation as asked for."""

    method: str
    needs: Needs
    sources: Sequence[Source]
    sites: Mapping[str, Site]  # shallow to deep
    weights: Sequence[float]  # they add up to 1
    weighed: bool = False  # whether they were given
    round: int = 1
    rank: int | None = None  # as asked for
    previous: Source | None = None
    fold: bool = False  # unequal scales into B
    tags: Tags | None = None

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    # ------------------------------------------------------------------ checks
    def check(self) -> None:
        """Refuse, from the headers alone, what the rule is undefined for."""
        for source in self.sources[1:]:
            for site in self.sites:
                self._check_pair(self.sources[0], source, site)
        if self.needs.equal_ranks and self.needs.previous and self.previous is not None:
            self._check_previous(self.sources[0], self.previous)

    def check_frozen(self, advance: Callable[[], None]) -> None:
        """Refuse clients that differ in the factor that the rule freezes."""
        first, *others = self.sources
        half = self.needs.frozen
        for site in self.sites:
            wanted = getattr(first.read(site), half)
            for source in others:
                if not torch.equal(getattr(source.read(site), half), wanted):
                    raise AdapterError(
                        f"{source.file}: '{getattr(source.places[site], half)}' differs from that "
                        f"of {first.folder}; {self.method} freezes {half} at one draw for all "
                        f"clients (fedit averages A too)."
                    )
            advance()

    def _check_pair(self, first: Source, source: Source, site: str) -> None:
        ours, theirs = first.places[site], source.places[site]
        if self.needs.equal_ranks and ours.rank != theirs.rank:
            others = [name for name, (_, rule) in rules().items() if not rule.needs.equal_ranks]
            raise AdapterError(
                f"{source.file}: '{theirs.A}' has rank {theirs.rank}, but {ours.rank} in "
                f"{first.folder}; {self.method} needs equal ranks ({', '.join(others)} do not)."
            )
        if self.needs.equal_scales and not self.fold and not _close(ours.scale, theirs.scale):
            raise AdapterError(
                f"{source.folder / CONFIG}: alpha / r of '{site}' is {theirs.scale:g}, but "
                f"{ours.scale:g} in {first.folder}, and a mean of factors is undefined for unequal "
                f"scales; --option rescale=B folds them into B first."
            )

    def _check_previous(self, first: Source, previous: Source) -> None:
        for site, place in previous.places.items():
            wanted = first.places[site].rank
            if place.rank != wanted:
                raise AdapterError(
                    f"{previous.file}: '{place.A}' has rank {place.rank}, but {wanted} in "
                    f"{first.folder}; {self.method} refers to a global adapter of the same rank."
                )

    # ------------------------------------------------------------------ in and out
    def arrivals(self, weights: Sequence[float]) -> Iterator[Arrived]:
        for site in self.sites.values():
            yield self.arrived(site, weights)

    def arrived(self, site: Site, weights: Sequence[float]) -> Arrived:
        """A site of all clients; where the rule takes means of factors, at one scale."""
        factors = [source.read(site.name) for source in self.sources]
        scale = self._scale(site.name)
        previous = None
        if self.previous is not None and self.needs.previous:
            previous = self.previous.read(site.name)
        if self.needs.equal_scales:
            factors = [at_scale(each, scale) for each in factors]
            previous = previous and at_scale(previous, scale)
        indices = None
        if self.tags is not None:
            factors = [self.tags.ordered(n, each) for n, each in enumerate(factors)]
            indices = self.tags.indices
        return Arrived(site, factors, weights, self._rank(site.name), scale, previous, indices)

    def adapters(self, given: Arrived, outcome: Outcome) -> tuple[Factors | None, list[Factors]]:
        """What is written: the global factors, and each client's at the scale that it came with.

        An adapter alone cannot change the base, so what would go there stands behind the global
        factors; it is compacted where it has more modules than the layer.
        """
        own = []
        for source, each in zip(self.sources, outcome.own or (), strict=outcome.own is not None):
            own.append(at_scale(each, source.places[given.name].scale))
        whole = outcome.whole
        if outcome.base is not None:
            whole = lean({given.name: self._with_base(given, outcome)})[given.name]
        return whole, own

    def noise(self, given: Arrived, whole: Factors | None) -> float | None:
        """``||G - ideal||`` of the global factors, before they are rounded to the file's precision;
        0.0 where it is nothing but the rounding of float64.
        """
        if whole is None:
            return None
        new, ends = {given.name: whole}, given.adapters
        if self.needs.by_index:
            most = max([given.rank] if self.tags else [each.rank for each in given.factors])
            old = {given.name: given.old(most)}
            found = index_aggregation_noise(new, old, ends, given.indices, given.weights)
            parts: Sequence[float] = [1.0] * len(ends)
        else:
            found = aggregation_noise(new, ends, given.weights)
            parts = given.weights
        return _beyond_rounding(found, given, parts)

    def _with_base(self, given: Arrived, outcome: Outcome) -> Factors:
        whole, base = outcome.whole, outcome.base
        assert base is not None
        if whole is None:
            return base
        if _size(base) <= _ROUNDING * _sum(given, given.weights):
            return whole
        base = at_scale(base, whole.scale)
        return replace(whole, A=torch.cat([whole.A, base.A]), B=torch.cat([whole.B, base.B], 1))

    def _scale(self, site: str) -> float:
        """The scale of the global factors: that of the (first) client with the largest rank."""
        places = [source.places[site] for source in self.sources]
        return max(places, key=lambda place: place.rank).scale

    def _rank(self, site: str) -> int:
        if self.tags is not None:
            return self.tags.rank
        return self.rank or max(source.places[site].rank for source in self.sources)


def at_scale(factors: Factors, scale: float) -> Factors:
    """The same update at another scale, folded into B unless it is only rounded otherwise."""
    if _close(factors.scale, scale):
        return replace(factors, scale=scale)
    return rescale({"": factors}, scale)[""]


def _close(first: float, second: float) -> bool:
    """Equal up to the rounding of ``alpha / r``."""
    return math.isclose(first, second, rel_tol=1e-12)


def _beyond_rounding(found: Noise, given: Arrived, parts: Sequence[float]) -> float:
    if found.total <= _ROUNDING * _sum(given, parts):
        return 0.0
    return found.total


def _sum(given: Arrived, parts: Sequence[float]) -> float:
    """A bound on the sum of the clients' updates."""
    sizes = [part * _size(each) for part, each in zip(parts, given.factors, strict=True)]
    return math.fsum(sizes)


def _size(factors: Factors) -> float:
    """A bound on the norm of an update."""
    return factors.scale * float(factors.A.norm() * factors.B.norm())
