"""Local-LoRA: every client alone. The opponent that federation has to beat.

Nothing travels. Each client trains one LoRA with its own rank from the shared draw.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods.contract import ClientInfo, Method, Trained
from fedgrove.methods.records import Nothing, Own


class Local(Method):
    name = "local"
    title = "Local-LoRA"
    paper = "no aggregation (the usual baseline)"
    trains = "A, B"
    shares = "nothing"
    keeps = "A, B"
    ranks = "mixed"
    federated = False
    no_rule = "its clients share nothing"
    State, Offer, Mine, Sent = Nothing, Nothing, Own, Nothing

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Nothing,
        mine: Own,
        round: int,
    ) -> tuple[Nothing, Own]:
        return Nothing(), Own(trained[-1].adapter("own"))

    def personal(
        self,
        client: ClientInfo,
        offer: Nothing,
        mine: Own,
    ) -> Assembly:
        if mine.own is None:
            own = self.setting.shared_draw(client.rank)
        else:
            own = mine.own
        return Assembly((Term("own", own, home="client"),))
