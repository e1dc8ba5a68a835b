"""The server's half of Fed-HeLLo and FedRA: clients that can afford some layers of one global
LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from pydantic import Field, Strict

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import Indices
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods._layers import budgets, layers_of, mean_where_held
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Setting,
    Update,
    shares,
)
from fedgrove.methods.records import OneAdapter

Share = Annotated[float, Field(gt=0, le=1)]


class LayerOptions(contract.WeightedOptions):
    """The keys of a method whose clients train some layers."""

    layers: Annotated[tuple[Share, ...], Strict(False), Field(min_length=1)] = Field(
        (0.25, 0.5, 0.75),
        description="Shares of the layers that a client can afford, dealt to the clients in name "
        "order, in turn.",
        examples=[[0.5, 1.0]],
    )


@dataclass(frozen=True, eq=False)
class LayersState:
    """The server's memory: how many layers each client trains, and, once ``open`` drew them,
    which.
    """

    whole: Adapter
    counts: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SomeOfIt:
    """What goes down: an adapter, and the layers to train, or how many; neither to a newcomer."""

    adapter: Adapter
    layers: list[int] | None = None
    count: int | None = None


class SomeLayers(Method):
    """One global LoRA, each layer the mean over those that trained it; ``draw`` says who trains
    which in a round.
    """

    averages_factors = True
    centres = "values"
    State, Offer, Sent = LayersState, SomeOfIt, OneAdapter
    Options: ClassVar[type[contract.Options]] = LayerOptions
    no_rule = (
        "each client trains other layers, and a directory does not say which of its layers "
        "were trained"
    )

    def __init__(self, options: LayerOptions, setting: Setting):
        super().__init__(options, setting)
        self.layers = layers_of(setting.sites)

    def draw(self, counts: Sequence[int], round: int) -> list[list[int]]:
        """For each client the places (0: the shallowest) of the ``counts[i]`` layers that it trains
        in this round.
        """
        raise NotImplementedError

    def begin(self, clients: Sequence[ClientInfo]) -> LayersState:
        names = [client.name for client in clients]
        counts = budgets(names, self.options.layers, len(self.layers))
        return LayersState(self.setting.shared_draw(), counts)

    def open(self, state: LayersState, round: int) -> LayersState:
        drawn = self.draw(list(state.counts.values()), round)
        rows: dict[str, list[int]] = {}
        for name, row in zip(state.counts, drawn, strict=True):
            rows[name] = [self.layers[place] for place in row]
        return replace(state, rows=rows)

    def aggregate(
        self,
        state: LayersState,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> LayersState:
        adapters = [update.content.adapter for update in updates]
        whole = mean_where_held(state.whole, adapters, self.weights(updates))
        return replace(state, whole=whole)

    def deploy(
        self,
        state: LayersState,
        round: int,
        client: ClientInfo,
    ) -> SomeOfIt:
        """All layers, whichever the client would train next."""
        return SomeOfIt(state.whole)

    def personal(
        self,
        client: ClientInfo,
        offer: SomeOfIt,
        mine: Mine,
    ) -> Assembly:
        return Assembly((Term("global", offer.adapter),))

    def global_assembly(self, state: LayersState) -> Assembly:
        return Assembly((Term("global", state.whole),))

    def modules(self, update: Update[OneAdapter]) -> tuple[Adapter, Indices | None]:
        return update.content.adapter, None

    def weights(self, updates: Sequence[Update]) -> list[float]:
        return shares(updates, self.options.weights)
