"""Which of the global rank indices a client's modules are, as its card (``fedgrove.json``) says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgrove.adapters.adapter import Factors
from fedgrove.aggregate.inputs import Source
from fedgrove.ground.errors import AdapterError
from fedgrove.interop.peft import CARD

#: What a client's card says: its rank indices and the global rank, where it says them.
Card = tuple[list[int] | None, int | None]


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
        rows = sorted(range(len(held)), key=held.__getitem__)
        A = factors.A[rows]
        B = factors.B[:, rows]
        return Factors(A, B, factors.scale)

    def notes(self, previous: Source | None) -> list[str]:
        """What the user should know of indices that no client holds."""
        untouched = set(range(self.rank))
        for each in self.held:
            untouched -= set(each)
        if not untouched:
            return []
        words = ", ".join(map(str, sorted(untouched)))
        where = "were kept from --previous"
        if previous is None:
            where = "are zero (no --previous)"
        return [f"Nobody trained the rank indices {words}: they {where}."]


def read_tags(
    sources: Sequence[Source],
    previous: Source | None,
    method: str,
) -> Tags:
    """What the clients' cards say; a client without one holds all indices. AdapterError where the
    cards contradict each other, the adapters or the last global one.
    """
    cards = [_card(source) for source in sources]
    stated = _stated_rank(sources, cards)
    ranks = [_one_rank(source, method) for source in sources]
    rank = stated or max(ranks)
    held = []
    for source, card, own in zip(sources, cards, ranks, strict=True):
        indices, _ = card
        held.append(_checked(source, indices, own, rank))
    if previous is not None:
        last = _one_rank(previous, method)
        if last != rank:
            raise AdapterError(
                f"{previous.folder}: the last global adapter has rank {last}, but the global rank "
                f"is {rank}; give the last round's own output."
            )
    return Tags(rank, tuple(held))


def _stated_rank(sources: Sequence[Source], cards: Sequence[Card]) -> int | None:
    """The one global rank of the cards; None where none states one."""
    stated: dict[int, Source] = {}
    for source, card in zip(sources, cards, strict=True):
        _, rank = card
        if rank is not None:
            stated[rank] = source
    if len(stated) > 1:
        (one, first), (two, second), *_ = stated.items()
        raise AdapterError(
            f"{second.folder / CARD}: global_rank is {two}, but {one} in {first.folder}; give all "
            f"the same."
        )
    return next(iter(stated), None)


def _checked(
    source: Source,
    indices: list[int] | None,
    own: int,
    rank: int,
) -> tuple[int, ...]:
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
    distinct = len(set(indices)) == own
    inside = min(indices) >= 0 and max(indices) < rank
    if not distinct or not inside:
        raise AdapterError(f"{path}: rank_indices {indices} must be distinct and in 0..{rank - 1}.")
    return tuple(indices)


def _card(source: Source) -> Card:
    """``rank_indices`` and ``global_rank`` of a client's card; None where there are none."""
    card = source.card()
    indices = card.get("rank_indices")
    rank = card.get("global_rank")
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


def _whole_numbers(values: object) -> bool:
    if not isinstance(values, list):
        return False
    kinds = set(map(type, values))
    return kinds <= {int}


def _one_rank(source: Source, method: str) -> int:
    found = {place.rank for place in source.places.values()}
    ranks = sorted(found)
    if len(ranks) > 1:
        raise AdapterError(
            f"{source.file}: the sites have ranks {ranks}; {method} needs one rank for all sites."
        )
    return ranks[0]
