"""What the round loop asks of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedgrove.methods.contract import Update

OfferOf = Callable[[str], Mapping[str, Any]]  # client name -> offer


@dataclass(frozen=True, eq=False)
class Arrival:
    """One client's update as it arrived, with figures for the log."""

    update: Update
    loss: float
    steps: int
    trained: int  # numbers that got a gradient
    up: int  # numbers that travelled up
    down: int
    bytes_up: int
    bytes_down: int
    seconds: float


class Engine(Protocol):
    """Runs client halves. Clients' private stores live on its side; the loop never sees inside them."""

    def train(self, round: int, clients: Sequence[str], offer: OfferOf) -> Iterator[Arrival]:
        """One round on the named clients; arrivals in any order."""

    def evaluate(self, clients: Sequence[str], offer: OfferOf, split: str) -> Iterator[tuple[str, dict[str, float]]]:
        """The personal model's measures on a split of each client's own data."""

    def changed(self) -> dict[str, dict[str, Any]]:
        """The private stores touched since the last call, for a checkpoint on the same machine."""

    def restore(self, stores: Mapping[str, dict[str, Any]]) -> None:
        """Put back what a checkpoint held."""
