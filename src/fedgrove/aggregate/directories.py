"""The clients' directories as a rule sees them: one site at a time, in float64, checked before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedgrove.adapters.adapter import Dora, Factors, Site
from fedgrove.adapters.algebra import rescale
from fedgrove.adapters.lowrank import lean
from fedgrove.adapters.noise import Noise, aggregation_noise, index_aggregation_noise
from fedgrove.aggregate.inputs import FactorNames, Source
from fedgrove.aggregate.options import named_rules
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
        first, *others = self.sources
        if first.dora and not self.needs.magnitudes:
            takers = named_rules(lambda needs: needs.magnitudes)
            raise AdapterError(
                f"{first.folder / CONFIG} has use_dora set: it is a DoRA adapter, and {self.method} "
                f"has no rule for its magnitudes ({takers} has)."
            )
        for source in others:
            for site in self.sites:
                self._check_pair(first, source, site)
        if self.previous is None:
            return
        if self.needs.equal_ranks and self.needs.previous:
            self._check_previous(first, self.previous)

    def check_frozen(self, advance: Callable[[], None]) -> None:
        """Refuse clients that differ in the factor that the rule freezes."""
        first, *others = self.sources
        half = self.needs.frozen
        for site in self.sites:
            wanted = getattr(first.read(site), half)
            for source in others:
                found = getattr(source.read(site), half)
                if not torch.equal(found, wanted):
                    name = getattr(source.places[site], half)
                    raise AdapterError(
                        f"{source.file}: '{name}' differs from that of {first.folder}; "
                        f"{self.method} freezes {half} at one draw for all clients (fedit averages "
                        f"A too)."
                    )
            advance()

    def _check_pair(self, first: Source, source: Source, site: str) -> None:
        ours = first.places[site]
        theirs = source.places[site]
        if self.needs.equal_ranks and ours.rank != theirs.rank:
            others = named_rules(lambda needs: not needs.equal_ranks)
            raise AdapterError(
                f"{source.file}: '{theirs.A}' has rank {theirs.rank}, but {ours.rank} in "
                f"{first.folder}; {self.method} needs equal ranks ({others} do not)."
            )
        one_scale = self.fold or _close(ours.scale, theirs.scale)
        if self.needs.equal_scales and not one_scale:
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
        previous: Factors | None = None
        if self.previous is not None and self.needs.previous:
            previous = self.previous.read(site.name)
        if self.needs.equal_scales:
            factors = [at_scale(each, scale) for each in factors]
            if previous is not None:
                previous = at_scale(previous, scale)
        indices: list[list[int]] | None = None
        if self.tags is not None:
            tags = self.tags
            factors = [tags.ordered(client, each) for client, each in enumerate(factors)]
            indices = tags.indices
        return Arrived(
            site,
            factors,
            weights,
            self._rank(site.name),
            scale,
            previous,
            indices,
        )

    def adapters(self, given: Arrived, outcome: Outcome) -> tuple[Factors | None, list[Factors]]:
        """What is written: the global factors, and each client's at the scale that it came with.

        An adapter alone cannot change the base, so what would go there stands behind the global
        factors; it is compacted where it has more modules than the layer.
        """
        site = given.name
        own = []
        if outcome.own is not None:
            for source, each in zip(self.sources, outcome.own, strict=True):
                place = source.places[site]
                own.append(at_scale(each, place.scale))
        whole = outcome.whole
        if outcome.base is not None:
            joined = self._with_base(given, whole, outcome.base)
            whole = lean({site: joined})[site]
        return whole, own

    def noise(self, given: Arrived, whole: Factors | None) -> float | None:
        """``||G - ideal||`` of the global factors, before they are rounded to the file's precision;
        0.0 where it is nothing but the rounding of float64.
        """
        if whole is None or isinstance(whole, Dora):  # DoRA's update is no product
            return None
        new = {given.name: whole}
        ends = given.adapters
        if self.needs.by_index:
            most = given.rank
            if self.tags is None:
                most = max(each.rank for each in given.factors)
            old = {given.name: given.old(most)}
            found = index_aggregation_noise(new, old, ends, given.indices, given.weights)
            parts: Sequence[float] = [1.0] * len(ends)
        else:
            found = aggregation_noise(new, ends, given.weights)
            parts = given.weights
        return _beyond_rounding(found, given, parts)

    def _with_base(self, given: Arrived, whole: Factors | None, base: Factors) -> Factors:
        """The global factors with what would go into the base behind them."""
        if whole is None:
            return base
        rounding = _ROUNDING * _sum(given, given.weights)
        if _size(base) <= rounding:
            return whole
        base = at_scale(base, whole.scale)
        A = torch.cat([whole.A, base.A])
        B = torch.cat([whole.B, base.B], 1)
        return replace(whole, A=A, B=B)

    def _places(self, site: str) -> list[FactorNames]:
        return [source.places[site] for source in self.sources]

    def _scale(self, site: str) -> float:
        """The scale of the global factors: that of the (first) client with the largest rank."""
        largest = max(self._places(site), key=lambda place: place.rank)
        return largest.scale

    def _rank(self, site: str) -> int:
        if self.tags is not None:
            return self.tags.rank
        if self.rank:
            return self.rank
        return max(place.rank for place in self._places(site))


def at_scale(factors: Factors, scale: float) -> Factors:
    """The same update at another scale, folded into B unless it is only rounded otherwise."""
    if _close(factors.scale, scale):
        return replace(factors, scale=scale)
    rescaled = rescale({"": factors}, scale)
    return rescaled[""]


def _close(first: float, second: float) -> bool:
    """Equal up to the rounding of ``alpha / r``."""
    return math.isclose(first, second, rel_tol=1e-12)


def _beyond_rounding(found: Noise, given: Arrived, parts: Sequence[float]) -> float:
    rounding = _ROUNDING * _sum(given, parts)
    if found.total <= rounding:
        return 0.0
    return found.total


def _sum(given: Arrived, parts: Sequence[float]) -> float:
    """A bound on the sum of the clients' updates."""
    pairs = zip(parts, given.factors, strict=True)
    sizes = [part * _size(each) for part, each in pairs]
    return math.fsum(sizes)


def _size(factors: Factors) -> float:
    """A bound on the norm of an update."""
    norms = factors.A.norm() * factors.B.norm()
    return factors.scale * float(norms)
