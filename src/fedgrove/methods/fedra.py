"""FedRA: each round a random matrix allots layers to clients; a client's model is built from its
layers alone.

Source: Su et al., "FedRA: A Random Allocation Strategy for Federated Tuning to Unleash the Power of
Heterogeneous Clients", arXiv 2311.11227. A client runs the embeddings, the allotted layers and the
head; the layers that it lacks are passed by. Each layer's LoRA becomes the mean over the clients
that had it; what a client deploys is the whole model.

Where we differ: what a client can afford is a share of the layers, dealt to the clients in turn
(``layers``), not a measured capacity. The matrix is drawn over all clients of the job; with partial
participation a layer that none of the round's clients had keeps its value. With ``layers = [1.0]``
this is FedIT.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods._layers import part, random_rows
from fedgrove.methods._some_layers import LayersState, SomeLayers, SomeOfIt
from fedgrove.methods.contract import ClientInfo, Mine, Plan, Step, Trained
from fedgrove.methods.records import OneAdapter


class FedRA(SomeLayers):
    name = "fedra"
    title = "FedRA"
    paper = "arXiv 2311.11227"
    trains = "A, B of its layers"
    shares = "those layers"
    keeps = "nothing"
    skips_layers = True

    # ------------------------------------------------------------------ server
    def offer(
        self,
        state: LayersState,
        round: int,
        client: ClientInfo,
    ) -> SomeOfIt:
        row = state.rows.get(client.name)
        if row is None:  # a newcomer
            return self.deploy(state, round, client)
        return SomeOfIt(part(state.whole, self.setting.sites, row), layers=row)

    def draw(self, counts: Sequence[int], round: int) -> list[list[int]]:
        return random_rows(
            counts,
            len(self.layers),
            self.setting.rng(round, "allocation"),
        )

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: SomeOfIt,
        mine: Mine,
        round: int,
    ) -> Plan:
        terms = (Term("global", offer.adapter),)
        if offer.layers is None or len(offer.layers) == len(self.layers):
            return [Step(Assembly(terms))]
        return [Step(Assembly(terms, layers=frozenset(offer.layers)))]

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: SomeOfIt,
        mine: Mine,
        round: int,
    ) -> tuple[OneAdapter, Mine]:
        return OneAdapter(trained[-1].adapter("global")), mine
