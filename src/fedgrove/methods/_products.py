"""What FlexLoRA and raFLoRA share: the server's truncated SVD of an update, handed out by leading
directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.adapters.lowrank import Split, leading
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Plan,
    State,
    Step,
    Trained,
    WeightedOptions,
)


class SplitOptions(WeightedOptions):
    """The keys of a method that hands out an SVD."""

    split: Literal["authors", "balanced"] = Field(
        "authors",
        description='Where the singular values go: "authors" all into B, with unit rows of A, as '
        'in FlexLoRA\'s published code; "balanced" their roots into both.',
    )

    @property
    def side(self) -> Split:
        """The split in the words of ``adapters.lowrank``."""
        return "right" if self.split == "authors" else "balanced"


class Truncations(Method):
    """The server keeps the SVD of its update at the largest rank; each client trains the first
    ``r_i`` directions.
    """

    trains = "A, B"
    shares = "A, B"
    keeps = "nothing"
    ranks = "mixed"
    Options: ClassVar[type[contract.Options]] = SplitOptions

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"global": self.setting.shared_draw(max(client.rank for client in clients))}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        scale = self.setting.scale(client.rank)
        adapter = {
            site: leading(factors, client.rank, scale, self.options.side)
            for site, factors in state["global"].items()
        }
        return {"adapter": adapter}

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("adapter", state["global"]),))

    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        return {"adapter": trained[-1].adapter("adapter")}, mine

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("adapter", offer["adapter"]),))
