"""Which of the global rank indices a client's modules are, as its card (``fedgrove.json``) says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedgrove.adapters.adapter import Factors
from fedgrove.aggregate.inputs import Source
from fedgrove.ground.errors import AdapterError
from fedgrove.interop.peft import CARD


@dataclass(frozen=True)
class Tags:
    """The global rank R, and per client the indices of its rows, in the order of its file."""

    rank: int
    held: tuple[tuple[int, ...], ...]

    @property
    def indices(self) -> list[list[int]]:
        """Per client its indices, ascending."""
        return [sorted(each) for each in self.held]

    def ordered(self, client: int, factors: Factors) -> Factors:
        """A client's rows in the order of ``indices``; they may come in any order."""
        held = self.held[client]
        row = sorted(range(len(held)), key=held.__getitem__)
        return Factors(factors.A[row], factors.B[:, row], factors.scale)

    def notes(self, previous: Source | None) -> list[str]:
        """What the user should know of indices that no client holds."""
        held = {index for each in self.held for index in each}
        untouched = sorted(set(range(self.rank)) - held)
        if not untouched:
            return []
        words = ", ".join(map(str, untouched))
        if previous is None:
            where = "are zero (no --previous)"
        else:
            where = "were kept from --previous"
        return [f"Nobody trained the rank indices {words}: they {where}."]


def read_tags(sources: Sequence[Source], previous: Source | None, method: str) -> Tags:
    """What the clients' cards say; a client without one holds all indices. AdapterError where the
    cards contradict each other, the adapters or the last global one.
    """
    cards = [_card(source) for source in sources]
    stated: dict[int, Source] = {}
    for source, (_, rank) in zip(sources, cards, strict=True):
        if rank is not None:
            stated[rank] = source
    if len(stated) > 1:
        (one, first), (two, second) = list(stated.items())[:2]
        raise AdapterError(
            f"{second.folder / CARD}: global_rank is {two}, but {one} in {first.folder}; give all "
            f"the same."
        )
    ranks = [_one_rank(source, method) for source in sources]
    rank = next(iter(stated), max(ranks))
    held = []
    for source, (indices, _), own in zip(sources, cards, ranks, strict=True):
        held.append(_checked(source, indices, own, rank))
    if previous is not None and _one_rank(previous, method) != rank:
        raise AdapterError(
            f"{previous.folder}: the last global adapter has rank {_one_rank(previous, method)}, "
            f"but the global rank is {rank}; give the last round's own output."
        )
    return Tags(rank, tuple(held))


def _checked(source: Source, indices: list[int] | None, own: int, rank: int) -> tuple[int, ...]:
    if indices is None:
        if own != rank:
            raise AdapterError(
                f"{source.folder} has rank {own} of {rank} and no {CARD} with rank_indices; add "
                f"one."
            )
        return tuple(range(own))
    path = source.folder / CARD
    if len(indices) != own:
        raise AdapterError(f"{path}: {len(indices)} rank_indices for an adapter of rank {own}.")
    if len(set(indices)) != own or min(indices) < 0 or max(indices) >= rank:
        raise AdapterError(f"{path}: rank_indices {indices} must be distinct and in 0..{rank - 1}.")
    return tuple(indices)


def _card(source: Source) -> tuple[list[int] | None, int | None]:
    """``rank_indices`` and ``global_rank`` of a client's card; None where there are none."""
    card = source.card()
    indices, rank = card.get("rank_indices"), card.get("global_rank")
    path = source.folder / CARD
    if indices is not None and not (_whole_numbers(indices) and indices):
        raise AdapterError(
            f"{path}: rank_indices must be a list of whole numbers, such as [0, 3, 5]."
        )
    if rank is not None and (not _whole_numbers([rank]) or rank < 1):
        raise AdapterError(
            f"{path}: global_rank is {rank!r}; it must be a whole number of at least 1."
        )
    if indices is not None and rank is None:
        raise AdapterError(f"{path} has rank_indices but no global_rank; give both.")
    return indices, rank


def _whole_numbers(values: Any) -> bool:
    if not isinstance(values, list):
        return False
    return all(isinstance(each, int) and not isinstance(each, bool) for each in values)


def _one_rank(source: Source, method: str) -> int:
    ranks = sorted({place.rank for place in source.places.values()})
    if len(ranks) > 1:
        raise AdapterError(
            f"{source.file}: the sites have ranks {ranks}; {method} needs one rank for all sites."
        )
    return ranks[0]
