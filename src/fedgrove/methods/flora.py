"""FLoRA: the clients' adapters are stacked, so that the server's update is the exact mean of the
products.

Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", arXiv 2409.05976. ``A = [p_1 A_1; ...]``, ``B = [B_1, ...]``: only A carries the
weights, so ``B A = sum p_i B_i A_i``. Every client merges the stack into its frozen base and starts
a fresh adapter (new A, zero B) in the next round.

Where we differ: A carries ``p_i s_i / s``, so that the product is right where the clients' scales
differ. A client that was away gets the whole merged update instead of all the stacks that it
missed, and beyond rank ``min(out, in)`` stack and merged update are compacted by SVD, which changes
no product. The fresh A is one draw for all clients, new in each round. The public repository's
FedIT branch, which keeps the first client only, is not followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods._merged import advance, held, merged_part, nothing_merged
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Plan,
    State,
    Step,
    Trained,
    Update,
    shares,
)
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine


@dataclass
class Stack:
    """All clients' modules, for the frozen base: the exact mean of the products."""

    options: contract.Options
    round: Round
    needs: ClassVar[Needs] = Needs()

    def site(self, given: Arrived) -> Outcome:
        rows = []
        for weight, each in zip(given.weights, given.factors, strict=True):
            rows.append(each.A * (weight * each.scale / given.scale))
        columns = [each.B for each in given.factors]
        return Outcome(base=Factors(torch.cat(rows), torch.cat(columns, 1), given.scale))


class FLoRA(Method):
    name = "flora"
    title = "FLoRA"
    paper = "arXiv 2409.05976"
    trains = "A, B, fresh each round"
    shares = "A, B"
    keeps = "nothing"
    ranks = "mixed"
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    Rule: ClassVar[type[ServerRule]] = Stack

    # ------------------------------------------------------------------ server
    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return nothing_merged()

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return merged_part(state, client)

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        weights = shares(updates, self.options.weights)
        stack = combine(rule, Arrivals(self.setting, adapters, weights)).base
        return advance(state, stack, [update.client for update in updates])

    def global_assembly(self, state: State) -> Assembly:
        return Assembly(base_delta=state["delta"] or None)

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        # The first round starts from the draw that every method starts from.
        purpose = "init" if round == 1 else f"round-{round}"
        return [Step(self._assembly(client, offer, mine, purpose))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        base = trained[-1].assembly.base_delta or {}
        return {"adapter": trained[-1].adapter("fresh")}, {"delta": base}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return self._assembly(
            client, offer, mine, "init"
        )  # B = 0: what local fine-tuning would train

    def _assembly(self, client: ClientInfo, offer: Offer, mine: Mine, purpose: str) -> Assembly:
        fresh = self.setting.shared_draw(client.rank, purpose)
        return Assembly((Term("fresh", fresh),), base_delta=held(offer, mine) or None)
