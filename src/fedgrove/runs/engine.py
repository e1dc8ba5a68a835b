"""What the round loop asks of an engine. Data, private stores and personal models stay on the
engine's side of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedgrove.ground.plain import Given, Plain
from fedgrove.methods.contract import ClientInfo, Update
from fedgrove.privacy.masked import Opened

OfferOf = Callable[[str], Given]  # client name -> offer
Ask = Callable[[Given | None], Given]  # a probe's report (or None) -> offer to a newcomer


@dataclass(frozen=True, eq=False)
class Arrival:
    """One client's update as it arrived, with figures for the log."""

    update: Update
    round: int  # the round it was trained in; earlier than the present one where it comes late
    loss: float
    steps: int
    trained: int  # numbers that got a gradient
    up: int  # numbers that travelled up
    down: int
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True)
class Absence:
    """A client that was asked and gave nothing, with the reason in words."""

    client: str
    reason: str
    trace: str = ""  # the client's own traceback, where it sent one


@dataclass(frozen=True, eq=False)
class Leaving:
    """What a client tells as it goes home with its adapter."""

    row: Plain  # metric_base, metric, metric_tuned, loss
    stored: int  # numbers in its personal model
    artefacts: dict[
        str, Any
    ]  # of ``ClientArtefacts.client_artefacts``; empty where they stay with the client
    texts: list[Plain] = field(
        default_factory=list
    )  # what its language model wrote; of a simulation alone


class Engine(Protocol):
    """Runs client halves."""

    @property
    def trusted(self) -> bool:
        """Whether clients run this very program: an update that breaks the method is then a bug,
        not their fault.
        """

    def joined(self, round: int) -> Sequence[ClientInfo]:
        """Clients that appeared since the last round."""

    def refuse(self, client: str, reason: str) -> None:
        """A client that joined cannot be served; it is not heard again."""

    def available(self, clients: Sequence[str]) -> list[str]:
        """Those of them that can be asked to train now, in the given order."""

    def train(
        self,
        round: int,
        clients: Sequence[str],
        offer: OfferOf,
    ) -> Iterator[Arrival | Absence]:
        """One round on the named clients, in any order; updates of earlier rounds may come in
        late.
        """

    def opened(self, round: int, updates: Sequence[Update]) -> Opened:
        """The sum of the round's masked updates (``privacy.secure_aggregation``). Raises
        ``FedgroveError`` where it stays closed.
        """

    def reject(self, client: str) -> None:
        """The client's newest update is not used: its store goes back to what it was before."""

    def evaluate(
        self,
        clients: Sequence[str],
        offer: OfferOf,
        split: str,
    ) -> Iterator[tuple[str, dict[str, float]] | Absence]:
        """The personal model's measures on a split of each client's own data."""

    def arrive(self, client: str, ask: Ask) -> Given:
        """A held-out client's offer: what the server gives at once, or after the method's probe."""

    def leave(
        self,
        clients: Sequence[str],
        offer: OfferOf,
        out: Path,
        unmeasured: Collection[str] = (),
    ) -> Iterator[tuple[str, Leaving] | Absence]:
        """Each client but the ``unmeasured`` is measured, and each writes its adapter: into ``out``
        where it is simulated, else at home.
        """

    def changed(self) -> dict[str, Plain]:
        """The private stores touched since the last call, for a checkpoint on the same machine."""

    def notes(self) -> Plain:
        """What else of the engine a checkpoint must hold."""

    def restore(self, stores: Mapping[str, Plain], notes: Given) -> None:
        """Put back what a checkpoint held."""

    def hold(self, notes: Given | None) -> None:
        """The clients' stores as these ``notes`` know them are asked for again at the end: they
        stay beside newer ones. None: no longer.
        """

    def go_back(self, stores: Mapping[str, Plain], notes: Given) -> None:
        """As ``restore``, to an earlier round of this very run: what was spent since of the
        examples' privacy stays spent.
        """
