"""What FlexLoRA and raFLoRA share: the server's truncated SVD of an update, handed out by leading
directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.adapters.lowrank import Split, leading
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Trained,
    WeightedOptions,
)
from fedgrove.methods.records import OneAdapter, Whole


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
        if self.split == "authors":
            return "right"
        return "balanced"


@dataclass(frozen=True, eq=False)
class Truncation:
    """What goes down: the update's leading directions, as many as the client's rank."""

    adapter: Adapter


class Truncations(Method):
    """The server keeps the SVD of its update at the largest rank; each client trains the first
    ``r_i`` directions.
    """

    trains = "A, B"
    shares = "A, B"
    keeps = "nothing"
    ranks = "mixed"
    centres = "weights"
    State: ClassVar[type[Whole]] = Whole
    Offer, Sent = Truncation, OneAdapter
    Options: ClassVar[type[contract.Options]] = SplitOptions

    def begin(self, clients: Sequence[ClientInfo]) -> Whole:
        return Whole(self.setting.shared_draw(max(client.rank for client in clients)))

    def offer(
        self,
        state: Whole,
        round: int,
        client: ClientInfo,
    ) -> Truncation:
        scale = self.setting.scale(client.rank)
        adapter: Adapter = {}
        for site, factors in state.whole.items():
            adapter[site] = leading(factors, client.rank, scale, self.options.side)
        return Truncation(adapter)

    def global_assembly(self, state: Whole) -> Assembly:
        return Assembly((Term("adapter", state.whole),))

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Truncation,
        mine: Mine,
        round: int,
    ) -> tuple[OneAdapter, Mine]:
        return OneAdapter(trained[-1].adapter("adapter")), mine

    def personal(
        self,
        client: ClientInfo,
        offer: Truncation,
        mine: Mine,
    ) -> Assembly:
        return Assembly((Term("adapter", offer.adapter),))
