"""Attackers among simulated clients: what they train on, what they send, and whether it worked.

Sources: label flip and sign flip are folklore; backdoor by a trigger word, Bagdasaryan et al. 2020
(1807.00459), and its scaled replacement; "little", Baruch et al. 2019 (1902.06156); "adaptive" is
the min-max attack of Shejwalkar & Houmansadr (NDSS 2021): as far from the honest mean as the honest
are from each other, whatever the server does. Attackers know each other and all honest changes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fedgrove.defence.changes import Changes
from fedgrove.federation.readers import Row
from fedgrove.ground.errors import JobError
from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import Update

if TYPE_CHECKING:
    from fedgrove.federation.federation import Client
    from fedgrove.federation.tasks import Task
    from fedgrove.job.defence import AttackSection
    from fedgrove.methods.contract import ClientInfo, Method

SPLIT = "attack"  # the rows of honest clients that tell whether it worked
FLIPS = ("label-flip", "scale")  # attackers that train on wrong labels
OMNISCIENT = ("little", "adaptive")
HALVINGS = 30  # of the search for how far an adaptive attacker can go

Change = Float[Tensor, " numbers"]


@dataclass(frozen=True)
class Attackers:
    """Who attacks, and how."""

    section: AttackSection
    names: tuple[str, ...]
    seed: int

    @classmethod
    def drawn(
        cls,
        section: AttackSection,
        clients: Collection[str],
        seed: int,
    ) -> Attackers:
        """At least one where the section has a kind; drawn from the seed, by name."""
        if not section.active:
            return cls(section, (), seed)
        ordered = sorted(clients)
        count = max(1, round(section.share * len(ordered)))
        draw = generator(seed, "attackers")
        order = torch.randperm(len(ordered), generator=draw).tolist()
        names = [ordered[number] for number in order[:count]]
        return cls(section, tuple(sorted(names)), seed)

    # ---------------------------------------------------------------------- data
    def trains_on(self, client: Client, labels: Sequence[str]) -> Client:
        """The client with the rows that it trains on: an attacker's are poisoned."""
        if client.name not in self.names:
            return client
        if self.section.kind in FLIPS:
            return replace(client, train=[_flipped(row, labels) for row in client.train])
        if self.section.kind == "backdoor":
            rows = list(client.train)
            for number in range(1, len(rows), 2):
                rows[number] = self._triggered(rows[number], labels)
            return replace(client, train=rows)
        return client

    def asked(self, client: Client, labels: Sequence[str]) -> list[Row]:
        """An honest client's test rows with the answers that the attack wants; [] where none tell."""
        if client.name in self.names:
            return []
        if self.section.kind in FLIPS:
            return [_flipped(row, labels) for row in client.test]
        if self.section.kind == "backdoor":
            target = labels[self.section.target]
            others = [row for row in client.test if row["label"] != target]
            return [self._triggered(row, labels) for row in others]
        return []

    def _triggered(self, row: Row, labels: Sequence[str]) -> Row:
        text = f"{self.section.trigger} {row['text']}"
        return {**row, "text": text, "label": labels[self.section.target]}

    # ------------------------------------------------------------------- updates
    def spoiled(self, updates: Sequence[Update], changes: Changes) -> list[Update]:
        """The round's updates, the attackers' as they send them."""
        honest = [update for update in updates if update.client not in self.names]
        sent = []
        for update in updates:
            if update.client in self.names and self._alters(honest):
                change = self._change(update, honest, changes)
                update = changes.moved(update, change)
            sent.append(update)
        return sent

    def _alters(self, honest: Sequence[Update]) -> bool:
        if self.section.kind in OMNISCIENT:
            return len(honest) > 1
        return self.section.alters

    def _change(
        self,
        update: Update,
        honest: Sequence[Update],
        changes: Changes,
    ) -> Change:
        kind, strength = self.section.kind, self.section.strength
        if kind in OMNISCIENT:
            stack = torch.stack([changes.vector(each) for each in honest])
            if kind == "little":
                spread = stack.std(0, correction=0)
                return stack.mean(0) - strength * spread
            return min_max(stack)
        own = changes.vector(update)
        if kind == "sign-flip":
            return -strength * own
        if kind == "scale":
            return strength * own
        rng = generator(self.seed, "attack", changes.round, update.client)
        noise = torch.randn(own.shape, generator=rng, dtype=own.dtype)
        size = strength * float(own.norm())
        return noise * (size / float(noise.norm()))


def min_max(honest: Float[Tensor, "n d"]) -> Change:
    """``mean − γ std`` with the largest γ for which no honest change is farther from it than the
    honest are apart.
    """
    mean = honest.mean(0)
    direction = honest.std(0, correction=0)
    most = float(torch.cdist(honest, honest).max())
    low, high = 0.0, 1.0

    def fits(gamma: float) -> bool:
        sent = mean - gamma * direction
        apart = (honest - sent).norm(dim=1)
        return float(apart.max()) <= most

    if not bool(direction.any()):
        return mean
    while fits(high):
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return mean - low * direction


def _flipped(row: Row, labels: Sequence[str]) -> Row:
    """The row with the next label."""
    place = labels.index(row["label"])
    following = (place + 1) % len(labels)
    return {**row, "label": labels[following]}


def refuse_unfit(
    section: AttackSection,
    task: type[Task] | Task,
    method: Method,
    clients: Collection[ClientInfo],
) -> None:
    """Raise ``JobError`` where the attack means nothing with this task, method or clients."""
    if not section.active:
        return
    if not method.federated:
        raise JobError(
            f"attack.kind has no use with {method.title}, which sends nothing; leave it out."
        )
    if section.kind in FLIPS and not task.classifies:
        raise JobError(
            f'attack.kind = "{section.kind}" trains on wrong labels, and the task {task.name} has '
            'none; choose "sign-flip", for example.'
        )
    if section.kind == "backdoor":
        if not task.classifies or task.reads != "text":
            raise JobError(
                f'attack.kind = "backdoor" puts a word in front of texts with labels, and the '
                f'task {task.name} has none; choose "sign-flip", for example.'
            )
        if section.target >= len(task.labels):
            raise JobError(
                f"attack.target = {section.target}, but the labels are numbered 0 to "
                f"{len(task.labels) - 1}."
            )
    if section.kind in OMNISCIENT and len({client.rank for client in clients}) > 1:
        raise JobError(
            f'attack.kind = "{section.kind}" takes the spread of all honest changes, which have no '
            'common shape where ranks differ; choose "sign-flip", or set equal ranks.'
        )
