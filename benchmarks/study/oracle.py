"""The ceiling of a perfect grouping: FedIT within the clients' true groups.

Not a method to deploy: it reads the groups off the clients' names, which a split by natural groups
calls ``GROUP-0``, ``GROUP-1`` …. Each group is a federation of its own, so nothing of one reaches
another; all run in one job, so that rows, splits, order and budget are those of every other method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgrove.methods.contract import Assembly, ClientInfo, Method, Mine, Trained, Update
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.records import OneAdapter, Whole


def group_of(client: str) -> str:
    """The true group of a client, from its name."""
    return client.rpartition("-")[0] or client


@dataclass(frozen=True, eq=False)
class Groups:
    """Each group's adapter."""

    groups: dict[str, Whole]


class Oracle(Method):
    """FedIT, group by group. ``registry.register`` makes it known to a study."""

    name = "oracle"
    title = "Oracle groups"
    paper = "the ceiling of a study: FedIT (arXiv 2305.05644) in each true group"
    trains = "A, B"
    shares = "A, B"
    keeps = "nothing"
    State, Offer, Sent = Groups, Whole, OneAdapter
    Options = FedIT.Options

    @property
    def fedit(self) -> FedIT:
        """What each group runs."""
        return FedIT(self.options, self.setting)

    def begin(self, clients: Sequence[ClientInfo]) -> Groups:
        names = sorted({group_of(client.name) for client in clients})
        return Groups({name: self.fedit.begin(clients) for name in names})

    def offer(self, state: Groups, round: int, client: ClientInfo) -> Whole:
        return self.fedit.offer(state.groups[group_of(client.name)], round, client)

    def aggregate(self, state: Groups, round: int, updates: Sequence[Update[OneAdapter]]) -> Groups:
        groups = dict(state.groups)
        for name, last in state.groups.items():
            members = [update for update in updates if group_of(update.client) == name]
            if members:
                groups[name] = self.fedit.aggregate(last, round, members)
        return Groups(groups)

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Whole, mine: Mine, round: int
    ) -> tuple[OneAdapter, Mine]:
        return self.fedit.report(client, trained, offer, mine, round)

    def personal(self, client: ClientInfo, offer: Whole, mine: Mine) -> Assembly:
        return self.fedit.personal(client, offer, mine)
