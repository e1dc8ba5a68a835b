"""An adapter directory of a smaller rank: the best approximation at every site, with what it costs.

For engines that serve adapters up to a rank (vLLM's ``max_lora_rank``), and for a small file.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.lowrank import compact, product_svd
from fedgrove.ground.errors import RunError
from fedgrove.interop import peft


@dataclass(frozen=True)
class Loss:
    """What a truncation changed of an update, in Frobenius norms relative to the update's."""

    rank: int  # at most
    error: float  # over all sites together
    site: str  # where the error relative to the site's own update is largest
    worst: float  # that error

    def words(self) -> str:
        if self.error == 0:
            return f"No site is above rank {self.rank}: nothing was cut off."
        return (
            f"Truncated to rank {self.rank}: relative error of the update {self.error:.2e}, at most "
            f"{self.worst:.2e} at one site ({self.site})."
        )


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, Loss]:
    """The best approximation of rank ``rank`` at each site (Eckart-Young), and its error."""
    lost, whole = 0.0, 0.0
    site, worst = next(iter(adapter)), 0.0
    for name, factors in adapter.items():
        cut, norm = _squares(factors, rank)
        lost += cut
        whole += norm
        relative = _ratio(cut, norm)
        if relative > worst:
            site, worst = name, relative
    return compact(adapter, rank), Loss(rank, _ratio(lost, whole), site, worst)


def _squares(factors: Factors, rank: int) -> tuple[float, float]:
    """Squared norms of what is cut off at one site, and of its whole update."""
    _, values, _ = product_svd([factors.map(lambda tensor: tensor.double())])
    squares = values.square()
    return float(squares[rank:].sum()), float(squares.sum())


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0
    return math.sqrt(part / whole)


def write_truncated(
    source: Path,
    out: Path,
    rank: int,
) -> Loss:
    """Write the adapter directory ``source`` to ``out`` with no site above ``rank``, the same head,
    and the error in its card (``truncated``).

    Raises ``RunError`` for a rank below 1, or a model that no PEFT adapter computes.
    """
    if rank < 1:
        raise RunError(f"--rank {rank} must be at least 1.")
    card = peft.read_json(source / peft.CARD)
    if "why" in card:
        raise RunError(f"{source} has no one rank to truncate: {card['why']}")
    adapter, head, config = peft.read_adapter(source)
    smaller, loss = truncate(adapter, rank)
    card = {key: value for key, value in card.items() if key not in ("tiers", "same_weights_as")}
    peft.rewrite(
        out,
        smaller,
        head,
        config,
        card={**card, "truncated": asdict(loss)},
    )
    return loss


def read_loss(folder: Path) -> Loss:
    """The error that ``write_truncated`` left in a card."""
    return Loss(**peft.read_json(folder / peft.CARD)["truncated"])
