"""The ceiling of a perfect grouping: FedIT within the clients' true groups.

Not a method to deploy: it reads the groups off the clients' names, which a split by natural groups
calls ``GROUP-0``, ``GROUP-1`` …. Each group is a federation of its own, so nothing of one reaches
another; all run in one job, so that rows, splits, order and budget are those of every other method.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgrove.methods import contract
from fedgrove.methods.contract import ClientInfo, Offer, State, Update
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.registry import register


def group_of(client: str) -> str:
    """The true group of a client, from its name."""
    return client.rpartition("-")[0] or client


@register
class Oracle(FedIT):
    name = "oracle"
    title = "Oracle groups"
    paper = "the ceiling of a study: FedIT (arXiv 2305.05644) in each true group"
    reduce = "each"
    averages_factors = False

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        groups = sorted({group_of(client.name) for client in clients})
        return {group: super(Oracle, self).begin(clients) for group in groups}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return super().offer(state[group_of(client.name)], round, client)

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        changed = dict(state)
        for group in state:
            members = [update for update in updates if group_of(update.client) == group]
            if members:
                changed[group] = super().aggregate(state[group], round, members)
        return changed

    def global_assembly(self, state: State) -> contract.Assembly | None:
        return None
