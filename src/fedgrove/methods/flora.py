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
from typing import ClassVar

import torch

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods._merged import (
    OWN_MERGED,
    Brought,
    Held,
    Merged,
    advance,
    brought,
    held,
    stays,
)
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Plan,
    Step,
    Trained,
    Update,
    shares,
)
from fedgrove.methods.records import OneAdapter
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
            share = weight * each.scale / given.scale
            rows.append(each.A * share)
        columns = [each.B for each in given.factors]
        stacked = Factors(
            A=torch.cat(rows),
            B=torch.cat(columns, 1),
            scale=given.scale,
        )
        return Outcome(base=stacked)


class FLoRA(Method):
    name = "flora"
    title = "FLoRA"
    paper = "arXiv 2409.05976"
    trains = "A, B, fresh each round"
    shares = "A, B"
    keeps = "nothing"
    ranks = "mixed"
    centres = "weights"
    State, Offer, Mine, Sent = Merged, Brought, Held, OneAdapter
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    Rule: ClassVar[type[ServerRule]] = Stack

    # ------------------------------------------------------------------ server
    def unmeasured(self) -> str:
        return OWN_MERGED

    def begin(self, clients: Sequence[ClientInfo]) -> Merged:
        return Merged()

    def offer(
        self,
        state: Merged,
        round: int,
        client: ClientInfo,
    ) -> Brought:
        return brought(state, client)

    def aggregate(
        self,
        state: Merged,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> Merged:
        adapters = [update.content.adapter for update in updates]
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        weights = shares(updates, self.options.weights)
        stack = combine(rule, Arrivals(self.setting, adapters, weights)).base
        return advance(state, stack, [update.client for update in updates])

    def global_assembly(self, state: Merged) -> Assembly:
        return Assembly(base_delta=state.delta or None)

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Brought,
        mine: Held,
        round: int,
    ) -> Plan:
        # The first round starts from the draw that every method starts from.
        if round == 1:
            purpose = "init"
        else:
            purpose = f"round-{round}"
        return [Step(self._assembly(client, offer, mine, purpose))]

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Brought,
        mine: Held,
        round: int,
    ) -> tuple[OneAdapter, Held]:
        return OneAdapter(trained[-1].adapter("fresh")), stays(trained[-1])

    def personal(
        self,
        client: ClientInfo,
        offer: Brought,
        mine: Held,
    ) -> Assembly:
        # The fresh adapter has B = 0: it is what local fine-tuning would train.
        return self._assembly(client, offer, mine, "init")

    def _assembly(
        self,
        client: ClientInfo,
        offer: Brought,
        mine: Held,
        purpose: str,
    ) -> Assembly:
        fresh = self.setting.shared_draw(client.rank, purpose)
        return Assembly((Term("fresh", fresh),), base_delta=held(offer, mine))
