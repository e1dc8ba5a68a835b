"""Client-level privacy: each client's change is clipped at the client, the server adds noise to the
sum.

McMahan et al., "Learning Differentially Private Recurrent Language Models" (ICLR 2018),
fixed-denominator estimator:
``state + (Σ clip(trained − received, C) + N(0, (z C)²)) / (q N)``, uniform weights, each of the N
clients drawn by its own coin of probability q. One flat norm over everything that travels, the head
included. The server clips again, in float64, so that one client that does not clip cannot spoil the
others' guarantee. With noise the sum is taken on a grid (``fedgrove.privacy.gaussian``). Under masks the
server sees neither changes nor an exact sum, and the clients add the noise (``privacy.masked``).

What the sum becomes is left to the method: its server half is given one update, the mean, which for
a method whose server needs no more than sums is the same as all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedgrove.adapters.tree import Tree, leaves, typed
from fedgrove.ground.plain import Given, Plain
from fedgrove.methods import protocols
from fedgrove.methods.contract import Method, Update
from fedgrove.methods.protocols import Counted
from fedgrove.privacy import accountant, masked, randomness
from fedgrove.privacy.gaussian import Grid
from fedgrove.privacy.reference import untouched
from fedgrove.privacy.vector import difference, flat, restore, shortened

if TYPE_CHECKING:
    from pathlib import Path

    from fedgrove.job import Job
    from fedgrove.job.privacy import PrivacySection
    from fedgrove.methods.contract import ClientInfo
    from fedgrove.methods.head import HeadPolicy
    from fedgrove.privacy.masked import Opened

MEAN = "(mean)"  # the name of the one update that the server half sees
OfferTo = Callable[[str], Given]


def addend(
    method: Method,
    sent: Given,
    offer: Given,
) -> Tree:
    """An update in the shape in which all clients' add up."""
    content = typed(method.Sent, sent["method"])
    offered = typed(method.Offer, offer.get("method", {}))
    return {
        **sent,
        "method": protocols.addend(method, content, offered),
    }


def change(
    method: Method,
    head: HeadPolicy,
    client: ClientInfo,
    sent: Given,
    received: Given,
    round: int,
) -> Float[Tensor, " numbers"]:
    """What the client changed, float64, over all indices."""
    before = untouched(
        method,
        head,
        client,
        received,
        round,
    )
    whose = f"{method.title} at {client.name}"
    return difference(
        addend(method, sent, received),
        addend(method, before, received),
        whose,
    )


def travels(
    method: Method,
    head: HeadPolicy,
    client: ClientInfo,
    offer: Given,
    round: int,
) -> int:
    """How many numbers a client's change has, which it knows as the server does."""
    nothing = untouched(
        method,
        head,
        client,
        offer,
        round,
    )
    return len(flat(addend(method, nothing, offer)))


@dataclass
class Protection:
    """The server's side: who is drawn, what the sum becomes, and what it has cost. ``releases`` is
    its only state.
    """

    section: PrivacySection
    method: Method
    head: HeadPolicy
    rate: float  # q
    key: str
    releases: int = 0  # rounds from which something of the clients was learnt

    @property
    def draws(self) -> bool:
        return self.section.client_noise > 0 and self.rate < 1

    def select(self, round: int, available: Sequence[str]) -> list[str]:
        """Poisson sampling: a coin for each client. May be nobody. The coins are as secret as the
        noise.
        """
        selected: list[str] = []
        for name in available:
            coin = randomness.uniform(
                self.key,
                1,
                "coin",
                round,
                name,
            )
            if float(coin) < self.rate:
                selected.append(name)
        return selected

    def combine(
        self,
        round: int,
        clients: Mapping[str, ClientInfo],
        updates: Sequence[Update],
        base: OfferTo,
        received: OfferTo,
        opened: Opened | None = None,
    ) -> Update:
        """The mean as one update; asked twice it gives the same.

        ``base``: what the server offers; ``received``: what of it arrived at a client;
        ``opened``: the sum of the changes, where updates are masked.
        """
        info = next(iter(clients.values()))
        if updates:
            info = clients[updates[0].client]
        offer = base(info.name)
        nothing = untouched(
            self.method,
            self.head,
            info,
            offer,
            round,
        )
        start = addend(self.method, nothing, offer)
        before = flat(start)
        length = len(before)
        if not length:
            return Update(MEAN, 1, start)  # a round in which nothing travels
        weights: float | None = None
        if opened is not None:
            total, weights = masked.read(self.section, opened, length)
        else:
            total = self._of_plain(
                round,
                clients,
                updates,
                received,
                length,
            )
        divisor: float | Tensor
        if weights is not None:
            divisor = weights
        else:
            divisor = self._divisor(
                round,
                clients,
                updates,
                received,
                length,
            )
        mean = restore(start, before + total / divisor)
        return Update(MEAN, 1, mean)

    def _of_plain(
        self,
        round: int,
        clients: Mapping[str, ClientInfo],
        updates: Sequence[Update],
        received: OfferTo,
        length: int,
    ) -> Float[Tensor, " length"]:
        """The sum of the clipped changes with its noise, float64 ``[length]``."""
        section = self.section
        changes = (
            change(
                self.method,
                self.head,
                clients[update.client],
                update.content,
                received(update.client),
                round,
            )
            for update in updates
        )
        if section.clip is not None:
            most = section.clip
            changes = (shortened(own, most) for own in changes)
        if not self._deviation:
            total = torch.zeros(length, dtype=torch.float64)
            for own in changes:
                total += own
            return total
        grid = Grid.fine(self._deviation, self.section.clip or 0.0)
        steps = torch.zeros(length, dtype=torch.int64)
        for own in changes:
            steps += grid.cut(own)
        return self._noisy(grid, steps, round)

    @property
    def _deviation(self) -> float:
        """The standard deviation of the sum's noise; 0 where there is none."""
        return self.section.client_noise * (self.section.clip or 0.0)

    def _noisy(
        self,
        grid: Grid,
        steps: Int[Tensor, " length"],
        round: int,
    ) -> Float[Tensor, " length"]:
        return grid.noisy(
            steps,
            self.key,
            "noise",
            round,
            randomness.digest(steps),
        )

    def _divisor(
        self,
        round: int,
        clients: Mapping[str, ClientInfo],
        updates: Sequence[Update],
        received: OfferTo,
        length: int,
    ) -> float | Float[Tensor, " length"]:
        """What the sum is divided by: one number, or one for each of its own."""
        if self.section.client_noise:
            return self.rate * len(clients)  # the same whoever took part
        if not isinstance(self.method, Counted):
            return float(len(updates))
        contents = []
        for update in updates:
            info = clients[update.client]
            offer = received(update.client)
            nothing = untouched(
                self.method,
                self.head,
                info,
                offer,
                round,
            )
            contents.append(nothing["method"])
        # of the method's part, which comes first; the head's numbers have every client's
        found = flat(self.method.divisors(contents))
        rest = torch.full(
            (length - len(found),),
            float(len(updates)),
            dtype=torch.float64,
        )
        return torch.cat([found, rest])

    def released(self, mean: Update) -> None:
        """The mean was used: count it, where there was something in it."""
        self.releases += any(True for _ in leaves(mean.content))

    def epsilon(self, clients: int) -> float | None:
        """ε so far, at ``delta``."""
        noise = self.section.client_noise
        return accountant.epsilon(
            noise,
            [(self.rate, self.releases)],
            self.delta(clients),
        )

    def delta(self, clients: int) -> float:
        return self.section.delta or accountant.default_delta(clients)

    def summary(self, clients: int) -> Plain:
        """For summary.json. ``epsilon`` None: no noise, so no guarantee."""
        return {
            "noise": self.section.client_noise,
            "clip": self.section.clip,
            "rate": self.rate,
            "rounds": self.releases,
            "delta": self.delta(clients),
            "epsilon": self.epsilon(clients),
            "randomness": self.section.randomness,
        }


def protection(
    job: Job,
    method: Method,
    head: HeadPolicy,
    folder: Path,
) -> Protection | None:
    """The server's side of the job's client level, with the run's key; None where the job has
    none.
    """
    section = job.privacy
    if not section.client_level:
        return None
    key = randomness.of_seed(job.run.seed, "server")
    at_the_server = section.client_noise and not section.secure_aggregation
    if at_the_server and section.randomness == "secret":
        key = randomness.kept(folder)
    return Protection(
        section,
        method,
        head,
        job.federation.fraction,
        key,
    )
