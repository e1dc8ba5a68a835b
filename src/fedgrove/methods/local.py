"""Local-LoRA: every client alone. The opponent that federation has to beat.

Nothing travels. Each client trains one LoRA with its own rank from the shared draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods.contract import ClientInfo, Method, Mine, Offer, Plan, Step, Trained


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

    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        return {}, {"own": trained[-1].adapter("own")}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        own = mine["own"] if "own" in mine else self.setting.shared_draw(client.rank)
        return Assembly((Term("own", own, home="client"),))
