"""The rules that need no groups: one site at a time, from the clients' factors to the global ones
(and their own).

The arithmetic is that of ``fedgrove.adapters``, as in the methods of the same names; sources and
choices are documented there. Everything here is in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.algebra import concat, index_mean, index_shares, mean, norm, pad, truncate
from fedgrove.adapters.lowrank import compact, product_svd
from fedgrove.adapters.noise import index_aggregation_noise
from fedgrove.adapters.residual import fair_correction, fedex_residual
from fedgrove.adapters.rotation import align
from fedgrove.aggregate.inputs import Source
from fedgrove.aggregate.options import FactorOptions, FairOptions, HetOptions, Options, RotOptions
from fedgrove.aggregate.rule import Result, Rule, Task, beyond_rounding, from_svd
from fedgrove.ground.errors import AdapterError
from fedgrove.interop.peft import CARD


class FedIT(Rule):
    name = "fedit"
    Options: ClassVar[type[Options]] = FactorOptions
    equal_ranks = True
    averages_factors = True

    def site(self, name: str, factors: list[Factors]) -> Result:
        whole = self.mean(self.common(name, factors))
        return Result(whole, noise=self.noise(whole, factors))

    def mean(self, factors: list[Factors]) -> Factors:
        return mean([{"": each} for each in factors], self.parts)[""]


class FFALoRA(FedIT):
    name = "ffa-lora"
    passes = 2

    def prepare(self, advance: Callable[[], None]) -> None:
        first, *others = self.task.sources
        for site in self.task.sites:
            frozen = first.read(site).A
            for source in others:
                if not torch.equal(source.read(site).A, frozen):
                    raise AdapterError(
                        f"{source.file}: '{source.places[site].A}' differs from that of "
                        f"{first.folder}; ffa-lora "
                        "freezes A at one draw for all clients (fedit averages A too)."
                    )
            advance()

    def site(self, name: str, factors: list[Factors]) -> Result:
        result = super().site(name, factors)
        assert result.whole is not None
        return replace(
            result, whole=replace(result.whole, A=factors[0].A)
        )  # not a mean of equals, which may round


class FedSA(FedIT):
    """A is averaged, B stays with its client."""

    name = "fedsa-lora"
    shared: ClassVar[str] = "A"

    def site(self, name: str, factors: list[Factors]) -> Result:
        common = self.common(name, factors)
        whole = self.mean(common)
        if self.shared == "A":
            own = [replace(each, A=whole.A) for each in common]
        else:
            own = [replace(each, B=whole.B) for each in common]
        return Result(None, self.home(name, own))


class FedVLM(FedSA):
    """B is averaged, A stays with its client."""

    name = "fedvlm"
    shared = "B"


class FLoRA(Rule):
    """The stack ``A = [p_i s_i / s A_i]``, ``B = [B_i]``; compacted where it has more modules than
    a full matrix.
    """

    name = "flora"

    def site(self, name: str, factors: list[Factors]) -> Result:
        scale = self.scale(name)
        whole = Factors(
            torch.cat(
                [
                    each.A * (part * each.scale / scale)
                    for part, each in zip(self.parts, factors, strict=True)
                ]
            ),
            torch.cat([each.B for each in factors], 1),
            scale,
        )
        whole = _compacted(whole)
        return Result(whole, noise=self.noise(whole, factors))


class FlexLoRA(Rule):
    name = "flexlora"
    takes_rank = True

    def site(self, name: str, factors: list[Factors]) -> Result:
        triplets = product_svd(factors, self.parts, self.most(name))
        whole, own = self.split(name, triplets)
        return Result(whole, own, self.noise(whole, factors))

    def most(self, site: str) -> int:
        """The rank that serves the global factors and every client."""
        return max(self.top_rank(site), *(source.places[site].rank for source in self.task.sources))

    def split(self, site: str, triplets: Any) -> tuple[Factors, list[Factors]]:
        own = []
        for source in self.task.sources:
            place = source.places[site]
            own.append(from_svd(triplets, place.rank, place.scale, "balanced"))
        return from_svd(triplets, self.top_rank(site), self.scale(site), "balanced"), own


class RaFLoRA(FlexLoRA):
    """Each rank index is the mean over the clients that own it; one that none owns stays as in
    ``--previous``.
    """

    name = "raflora"
    takes_previous = True

    def site(self, name: str, factors: list[Factors]) -> Result:
        old = self._previous(name, factors)
        rows = [torch.arange(each.rank) for each in factors]
        parts = [
            {"": replace(each, B=each.B * share)}
            for each, share in zip(factors, index_shares(rows, self.parts, old.rank), strict=True)
        ]
        owned = max(each.rank for each in factors)
        rest = {"": Factors(old.A[owned:], old.B[:, owned:], old.scale)}
        triplets = product_svd([concat([*parts, rest])[""]], None, self.most(name))
        whole, own = self.split(name, triplets)
        noise = index_aggregation_noise(
            {"": whole}, {"": old}, [{"": each} for each in factors], None, self.parts
        )
        return Result(whole, own, beyond_rounding(noise.sites[""], factors, [1.0] * len(factors)))

    def _previous(self, site: str, factors: list[Factors]) -> Factors:
        """The last global factors, with at least as many modules as the largest client."""
        owned = max(each.rank for each in factors)
        if self.task.previous is None:
            return _zero(factors[0], owned, self.scale(site))
        old = self.task.previous.read(site)
        return old if old.rank >= owned else pad({"": old}, owned)[""]


class HETLoRA(Rule):
    """Zero-padded means, by the norms of the clients' updates (or by ``--weights``); a client gets
    its first rows.
    """

    name = "hetlora"
    Options: ClassVar[type[Options]] = HetOptions
    averages_factors = True
    takes_previous = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if self.options.variant == "full" and task.weights is not None:
            self.notes.append(
                "hetlora weighs clients by the norms of their updates; --weights was not used "
                "(--option "
                "variant=reduced uses it)."
            )

    def prepare(self, advance: Callable[[], None]) -> None:
        squares = torch.zeros(len(self.task.sources), dtype=torch.float64)
        for site in self.task.sites:
            for number, source in enumerate(self.task.sources):
                squares[number] += norm({"": source.read(site)})[""] ** 2
            advance()
        norms = squares.sqrt()
        if self.options.variant == "full":
            uniform = torch.full_like(norms, 1.0 / len(norms))
            self.parts = (norms / norms.sum() if norms.sum() > 0 else uniform).tolist()

    passes = 2

    def site(self, name: str, factors: list[Factors]) -> Result:
        common = self.common(name, factors)
        most = max(each.rank for each in factors)
        whole = mean([pad({"": each}, most) for each in common], self.parts)[""]
        if self.task.previous is not None and self.task.previous.places[name].rank > most:
            # What no client of this round holds keeps its last value.
            old = self.at(self.task.previous.read(name), whole.scale)
            whole = replace(
                whole,
                A=torch.cat([whole.A, old.A[most:]]),
                B=torch.cat([whole.B, old.B[:, most:]], 1),
            )
        own = [truncate({"": whole}, each.rank)[""] for each in factors]
        return Result(whole, self.home(name, own), self.noise(whole, factors))


class FedExLoRA(FedIT):
    """FedIT's means and, behind them, the modules of the residual: the product is the exact mean of
    the products.
    """

    name = "fedex-lora"

    def site(self, name: str, factors: list[Factors]) -> Result:
        common = self.common(name, factors)
        whole = self.mean(common)
        if len(common) > 1:
            residual = self.at(
                fedex_residual([{"": each} for each in common], self.parts)[""], whole.scale
            )
            whole = replace(
                whole,
                A=torch.cat([whole.A, residual.A]),
                B=torch.cat([whole.B, residual.B], 1),
                scale=whole.scale,
            )
        whole = _compacted(whole)
        return Result(whole, noise=self.noise(whole, factors))


class LoRAFair(FedIT):
    name = "lora-fair"
    Options: ClassVar[type[Options]] = FairOptions

    def site(self, name: str, factors: list[Factors]) -> Result:
        options, whole = self.options, self.mean(self.common(name, factors))
        target = concat([{"": each} for each in factors], self.parts)[""]
        change = fair_correction(
            target,
            whole,
            lam=options.lam,
            lr=options.lr,
            tol=options.tol,
            max_steps=options.max_steps,
        )
        whole = replace(whole, B=whole.B + change)
        return Result(whole, noise=self.noise(whole, factors))


class FedRotLoRA(FedIT):
    """Every client's rank space turned to ``--previous`` before the means; the first round turns
    nothing.
    """

    name = "fedrot-lora"
    Options: ClassVar[type[Options]] = RotOptions
    takes_previous = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.round = self.options.round or task.round
        if self.round > 1 and task.previous is None:
            raise AdapterError(
                f"fedrot-lora turns clients to the last global adapter in round {self.round}: give "
                f"--previous."
            )
        if self.round == 1:
            self.notes.append(
                "This is the first round (no --previous): nothing was rotated, as fedit."
            )
        else:
            self.notes.append(f"Round {self.round}: aligned {self.half} to --previous.")

    @property
    def half(self) -> Any:
        return "A" if self.round % 2 else "B"

    def check(self) -> None:
        super().check()
        if self.round > 1 and self.task.previous is not None:
            same_rank(self.task.previous, self.task.sources[0], "fedrot-lora")

    def site(self, name: str, factors: list[Factors]) -> Result:
        common = self.common(name, factors)
        if self.round > 1 and self.task.previous is not None:
            old = self.task.previous.read(name)
            common = [align(each, old, self.half, self.options.lam) for each in common]
        whole = self.mean(common)
        return Result(whole, noise=self.noise(whole, factors))


class FedPLoRA(Rule):
    """The mean of each rank index over the clients that trained it; others from ``--previous``,
    else zero.
    """

    name = "fed-plora"
    Options: ClassVar[type[Options]] = FactorOptions
    averages_factors = True
    takes_previous = True

    def check(self) -> None:
        super().check()
        cards = [_tags(source) for source in self.task.sources]
        stated = {
            rank: source for source, (_, rank) in zip(self.task.sources, cards, strict=True) if rank
        }
        if len(stated) > 1:
            (one, first), (two, second) = list(stated.items())[:2]
            raise AdapterError(
                f"{second.folder / CARD}: global_rank is {two}, but {one} in {first.folder}; give "
                f"all the same."
            )
        ranks = {source: _one_rank(source) for source in self.task.sources}
        self.rank = next(iter(stated), None) or max(ranks.values())
        self.indices: list[list[int]] = []
        for source, (indices, _) in zip(self.task.sources, cards, strict=True):
            self.indices.append(self._checked(source, indices, ranks[source]))
        if self.task.previous is not None and _one_rank(self.task.previous) != self.rank:
            raise AdapterError(
                f"{self.task.previous.folder}: the last global adapter has rank "
                f"{_one_rank(self.task.previous)}, but "
                f"the global rank is {self.rank}; give the last round's own output."
            )
        untouched = sorted(
            set(range(self.rank)) - {index for each in self.indices for index in each}
        )
        if untouched:
            source_of = (
                "were kept from --previous" if self.task.previous else "are zero (no --previous)"
            )
            self.notes.append(
                f"Nobody trained the rank indices {', '.join(map(str, untouched))}: they "
                f"{source_of}."
            )

    def _checked(self, source: Source, indices: list[int] | None, rank: int) -> list[int]:
        if indices is None:
            if rank != self.rank:
                raise AdapterError(
                    f"{source.folder} has rank {rank} of {self.rank} and no {CARD} with "
                    f"rank_indices; add one."
                )
            return list(range(rank))
        if len(indices) != rank:
            raise AdapterError(
                f"{source.folder / CARD}: {len(indices)} rank_indices for an adapter of rank "
                f"{rank}."
            )
        if len(set(indices)) != rank or min(indices) < 0 or max(indices) >= self.rank:
            raise AdapterError(
                f"{source.folder / CARD}: rank_indices {indices} must be distinct and in "
                f"0..{self.rank - 1}."
            )
        return indices

    def site(self, name: str, factors: list[Factors]) -> Result:
        scale = self.scale(name)
        old = _zero(factors[0], self.rank, scale)
        if self.task.previous is not None:
            old = self.at(self.task.previous.read(name), scale)
        modules, indices = [], []
        for each, held in zip(self.common(name, factors), self.indices, strict=True):
            row = sorted(range(len(held)), key=held.__getitem__)  # rows may come in any order
            modules.append({"": replace(each, A=each.A[row], B=each.B[:, row])})
            indices.append(sorted(held))
        whole = index_mean(modules, indices, {"": old}, self.task.weights)
        noise = index_aggregation_noise(
            whole, {"": old}, modules, indices, self.task.weights
        ).sites[""]
        return Result(whole[""], noise=beyond_rounding(noise, factors, [1.0] * len(factors)))


def same_rank(previous: Source, first: Source, method: str) -> None:
    for site, place in previous.places.items():
        if place.rank != first.places[site].rank:
            raise AdapterError(
                f"{previous.file}: '{place.A}' has rank {place.rank}, but "
                f"{first.places[site].rank} in {first.folder}; "
                f"{method} refers to a global adapter of the same rank."
            )


def _tags(source: Source) -> tuple[list[int] | None, int | None]:
    """``rank_indices`` and ``global_rank`` of a client's card; None where there are none."""
    card = source.card()
    indices, rank = card.get("rank_indices"), card.get("global_rank")
    path = source.folder / CARD
    whole = isinstance(indices, list) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in indices
    )
    if indices is not None and not (whole and indices):
        raise AdapterError(
            f"{path}: rank_indices must be a list of whole numbers, such as [0, 3, 5]."
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(
            f"{path}: global_rank is {rank!r}; it must be a whole number of at least 1."
        )
    if indices is not None and rank is None:
        raise AdapterError(f"{path} has rank_indices but no global_rank; give both.")
    return indices, rank


def _one_rank(source: Source) -> int:
    ranks = sorted({place.rank for place in source.places.values()})
    if len(ranks) > 1:
        raise AdapterError(
            f"{source.file}: the sites have ranks {ranks}; fed-plora needs one rank for all sites."
        )
    return ranks[0]


def _zero(like: Factors, rank: int, scale: float) -> Factors:
    return Factors(
        like.A.new_zeros(rank, like.A.shape[1]), like.B.new_zeros(like.B.shape[0], rank), scale
    )


def _compacted(factors: Factors) -> Factors:
    """The same update with at most ``min(out, in)`` modules."""
    full = min(factors.B.shape[0], factors.A.shape[1])
    return factors if factors.rank <= full else compact({"": factors})[""]
