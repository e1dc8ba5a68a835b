"""What a client changed in a round, measured from what it would have sent without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from fedgrove.ground.plain import Given
from fedgrove.methods.contract import Update
from fedgrove.privacy.reference import untouched
from fedgrove.privacy.vector import difference, flat, restore

if TYPE_CHECKING:
    from fedgrove.methods.contract import ClientInfo, Method
    from fedgrove.methods.head import HeadPolicy


@dataclass
class Changes:
    """Of one round; each client's start is worked out once."""

    method: Method
    head: HeadPolicy
    clients: Mapping[str, ClientInfo]
    received: Callable[[str], Given]  # what arrived at a client
    round: int
    _starts: dict[str, Given] = field(default_factory=dict)

    def start(self, client: str) -> Given:
        """What the client would have sent had it trained nothing."""
        if client not in self._starts:
            self._starts[client] = untouched(
                self.method,
                self.head,
                self.clients[client],
                self.received(client),
                self.round,
            )
        return self._starts[client]

    def vector(self, update: Update) -> Float[Tensor, " numbers"]:
        """The change, float64."""
        start = self.start(update.client)
        whose = f"{self.method.title} at {update.client}"
        return difference(update.content, start, whose)

    def moved(self, update: Update, change: Float[Tensor, " numbers"]) -> Update:
        """The update with another change."""
        start = flat(self.start(update.client))
        content = restore(update.content, start + change)
        return replace(update, content=content)

    def scaled(self, update: Update, scale: float) -> Update:
        """The update with its change times ``scale``."""
        return self.moved(update, self.vector(update) * scale)
