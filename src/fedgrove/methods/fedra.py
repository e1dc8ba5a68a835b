"""FedRA: each round a random matrix allots layers to clients; a client's model is built from its layers alone.

Source: Su et al., "FedRA: A Random Allocation Strategy for Federated Tuning to Unleash the Power of Heterogeneous
Clients", arXiv 2311.11227. A client runs the embeddings, the allotted layers and the head; the layers that it lacks are
passed by. Each layer's LoRA becomes the mean over the clients that had it; what a client deploys is the whole model.

Where we differ: what a client can afford is a share of the layers, dealt to the clients in turn (``layers``), not a
measured capacity. The matrix is drawn over all clients of the job; with partial participation a layer that none of the
round's clients had keeps its value. With ``layers = [1.0]`` this is FedIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, Strict

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import Indices
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods._layers import budgets, layers_of, mean_where_held, part, random_rows
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Plan,
    Setting,
    State,
    Step,
    Trained,
    Update,
    shares,
)

Share = Annotated[float, Field(gt=0, le=1)]


class RAOptions(contract.WeightedOptions):
    layers: Annotated[tuple[Share, ...], Strict(False), Field(min_length=1)] = Field(
        (0.25, 0.5, 0.75),
        description="Shares of the layers that a client can afford, dealt to the clients in name order, in turn.",
    )


class FedRA(Method):
    name = "fedra"
    title = "FedRA"
    paper = "arXiv 2311.11227"
    trains = "A, B of its layers"
    shares = "those layers"
    keeps = "nothing"
    averages_factors = True
    Options: ClassVar[type[contract.Options]] = RAOptions

    def __init__(self, options: Any, setting: Setting):
        super().__init__(options, setting)
        self.layers = layers_of(setting.sites)
        self._drawn: tuple[int, dict[str, list[int]]] | None = None  # a round's matrix: every client asks for its row

    # ------------------------------------------------------------------ server
    def begin(self, clients: Sequence[ClientInfo]) -> State:
        counts = budgets([client.name for client in clients], self.options.layers, len(self.layers))
        return {"global": self.setting.shared_draw(), "counts": counts}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        if round > self.setting.rounds or client.name not in state["counts"]:
            return {"global": state["global"]}
        row = self._matrix(state, round)[client.name]
        return {"global": part(state["global"], self.setting.sites, row), "layers": row}

    def deploy(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {"global": state["global"]}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        return {**state, "global": mean_where_held(state["global"], adapters, self.weights(updates))}

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("global", state["global"]),))

    def modules(self, update: Update) -> tuple[Adapter, Indices | None]:
        return update.content["adapter"], None

    def weights(self, updates: Sequence[Update]) -> list[float]:
        return shares(updates, self.options.weights)

    def _matrix(self, state: State, round: int) -> dict[str, list[int]]:
        if self._drawn is None or self._drawn[0] != round:
            counts: dict[str, int] = state["counts"]
            rows = random_rows(list(counts.values()), len(self.layers), self.setting.rng(round, "allocation"))
            named = {name: [self.layers[n] for n in row] for name, row in zip(counts, rows, strict=True)}
            self._drawn = (round, named)
        return self._drawn[1]

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        some = len(offer["layers"]) < len(self.layers)
        return [Step(Assembly((Term("global", offer["global"]),), layers=frozenset(offer["layers"]) if some else None))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        return {"adapter": trained[-1].adapter("global")}, mine

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("global", offer["global"]),))
