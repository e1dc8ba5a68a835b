"""The ceiling of a perfect grouping, FedIT within the clients' true groups; and grove with other
groups than it would grow.

Not a method to deploy: it reads the groups off the clients' names, which a split by natural groups
calls ``GROUP-0``, ``GROUP-1`` …. Each group is a federation of its own, so nothing of one reaches
another; all run in one job, so that rows, splits, order and budget are those of every other method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field, Strict

from fedgrove.clustering.matrix import Matrix
from fedgrove.clustering.tree import LayerCut
from fedgrove.methods import contract
from fedgrove.methods.contract import Assembly, ClientInfo, Method, Mine, Trained, Update
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.grove import Grove, GroveOptions
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


class OtherGroups(GroveOptions):
    """The keys of ``[method]`` for the ablations of grove's groups."""

    counts: Annotated[tuple[int, ...], Strict(False)] = Field(
        (),
        description="Nodes in each layer of the true tree, shallow to deep; not set: the groups that "
        "grove found in the deepest layer, in all layers.",
    )


class Regrouped(Grove):
    """grove, with the true groups or with the same ones in all layers. Not a method to deploy."""

    name = "grove-regrouped"
    title = "Grove, other groups"
    paper = "an ablation of a study"
    Options: ClassVar[type[contract.Options]] = OtherGroups

    def _cuts(
        self,
        names: Sequence[str],
        first: list[Matrix],
        second: list[Matrix],
        merges: Matrix,
    ) -> list[LayerCut]:
        """As in Grove."""
        counts = self.options.counts
        if not counts:
            deepest = super()._cuts(names, first, second, merges)[-1]
            return [replace(deepest, layer=layer) for layer in range(len(first))]
        kinds = sorted({group_of(name) for name in names})
        own = np.array([kinds.index(group_of(name)) for name in names])
        cuts = []
        for layer, count in enumerate(counts):
            cuts.append(LayerCut(layer, count, 0.0, own * count // len(kinds)))
        return cuts


#: what a study knows beside the package's own methods
METHODS = (Oracle, Regrouped)
