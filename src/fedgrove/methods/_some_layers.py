"""The server's half of Fed-HeLLo and FedRA: clients that can afford some layers of one global
LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

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
    Offer,
    Setting,
    State,
    Update,
    shares,
)

Share = Annotated[float, Field(gt=0, le=1)]


class LayerOptions(contract.WeightedOptions):
    """The keys of a method whose clients train some layers."""

    layers: Annotated[tuple[Share, ...], Strict(False), Field(min_length=1)] = Field(
        (0.25, 0.5, 0.75),
        description="Shares of the layers that a client can afford, dealt to the clients in name "
        "order, in turn.",
        examples=[[0.5, 1.0]],
    )


class SomeLayers(Method):
    """One global LoRA, each layer the mean over those that trained it; ``draw`` says who trains
    which in a round.
    """

    averages_factors = True
    Options: ClassVar[type[contract.Options]] = LayerOptions
    no_rule = (
        "each client trains other layers, and a directory does not say which of its layers "
        "were trained"
    )

    def __init__(self, options: Any, setting: Setting):
        super().__init__(options, setting)
        self.layers = layers_of(setting.sites)

    def draw(self, counts: Sequence[int], round: int) -> list[list[int]]:
        """For each client the places (0: the shallowest) of the ``counts[i]`` layers that it trains
        in this round.
        """
        raise NotImplementedError

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        counts = budgets([client.name for client in clients], self.options.layers, len(self.layers))
        return {"global": self.setting.shared_draw(), "counts": counts}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        return {
            **state,
            "global": mean_where_held(state["global"], adapters, self.weights(updates)),
        }

    def deploy(self, state: State, round: int, client: ClientInfo) -> Offer:
        """All layers, whichever the client would train next."""
        return {"global": state["global"]}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("global", offer["global"]),))

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("global", state["global"]),))

    def modules(self, update: Update) -> tuple[Adapter, Indices | None]:
        return update.content["adapter"], None

    def weights(self, updates: Sequence[Update]) -> list[float]:
        return shares(updates, self.options.weights)

    def open(self, state: State, round: int) -> State:
        """With ``rows``: the layers that each client trains in this round."""
        counts: dict[str, int] = state["counts"]
        drawn = self.draw(list(counts.values()), round)
        rows = {
            name: [self.layers[n] for n in row] for name, row in zip(counts, drawn, strict=True)
        }
        return {**state, "rows": rows}
