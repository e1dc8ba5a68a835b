"""One head policy for every method of a comparison: ``local``, ``shared`` or ``frozen``.

``local``: each client trains and keeps its own head, from one shared initial draw. Where newcomers
are expected, copies travel up and their mean is kept for clients that join later; no client's own
head is ever replaced. ``shared``: the mean goes down and up each round. ``frozen``: the initial
draw, for everyone, for ever. The head decides more than the method under label skew, which is why
no method has a policy of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra
from fedgrove.adapters.centre import active, centred, plain_gram, reweighed
from fedgrove.ground.plain import Given, Plain
from fedgrove.methods.contract import Offer, Step, Update

PREFIX = "head."


@dataclass(frozen=True, eq=False)
class HeadPolicy:
    """Adds the head to every assembly, and its part to what travels."""

    mode: Literal["local", "shared", "frozen"]
    initial: Mapping[str, Tensor]  # the shared draw, from the job's seed: costs no message
    newcomers: bool = False  # keep a mean of the clients' heads for clients that join later

    @property
    def travels(self) -> bool:
        if self.mode == "local":
            return self.newcomers
        return self.mode == "shared"

    # ------------------------------------------------------------------ client
    def attach(
        self,
        assembly: Assembly,
        offer: Given,
        store: Given,
        train: bool = True,
    ) -> Assembly:
        """The assembly with this client's head as extras named ``head.*``."""
        head = self._current(offer, store)
        if self.travels:
            home: Literal["server", "client"] = "server"
        else:
            home = "client"
        trains = train and self.mode != "frozen"
        extras: dict[str, Extra] = {}
        for name, value in head.items():
            extras[PREFIX + name] = Extra(
                value,
                train=trains,
                home=home,
                lr=None,
            )
        return assembly.with_extras(extras)

    def step(
        self,
        step: Step,
        offer: Given,
        store: Given,
    ) -> Step:
        assembly = self.attach(step.assembly, offer, store, train=step.head)
        return replace(step, assembly=assembly)

    def after(self, assembly: Assembly) -> dict[str, Tensor]:
        """The head out of a trained assembly, tensors ``[...]`` by name."""
        head: dict[str, Tensor] = {}
        for name, extra in assembly.extras.items():
            if name.startswith(PREFIX):
                own = name.removeprefix(PREFIX)
                head[own] = extra.value
        return head

    def _current(
        self,
        offer: Given,
        store: Given,
    ) -> Mapping[str, Tensor]:
        """This client's head before it trains, tensors ``[...]`` by name."""
        if self.mode == "local" and "head" in store:
            head: Mapping[str, Tensor] = store["head"]
            return head
        return offer.get("head") or self.initial

    # ------------------------------------------------------------------ server
    def offer(
        self,
        head: Mapping[str, Tensor] | None,
        newcomer: bool,
    ) -> Mapping[str, Tensor] | None:
        """What goes down: the mean, tensors ``[...]`` by name, each round where it is shared, once
        to a newcomer where heads are local.
        """
        if self.mode == "shared":
            return head
        awaited = newcomer and self.newcomers
        if self.mode == "local" and awaited:
            return head
        return None

    def beside(
        self,
        content: Offer,
        head: Mapping[str, Tensor] | None,
        *,
        newcomer: bool,
    ) -> Plain:
        """A whole offer: the method's part, and the head (tensors ``[...]`` by name) where one goes
        down.
        """
        offered = self.offer(head, newcomer)
        if offered:
            return {"method": content, "head": dict(offered)}
        return {"method": content}

    def aggregate(
        self,
        head: Mapping[str, Tensor] | None,
        updates: Sequence[Update],
    ) -> Mapping[str, Tensor] | None:
        """The mean of the heads that arrived, tensors ``[...]`` by name, weighted by examples."""
        arrived = [update for update in updates if "head" in update.content]
        if not self.travels or not arrived:
            return head
        total = sum(update.examples for update in arrived)
        shares = [update.examples / total for update in arrived]
        heads = [update.content["head"] for update in arrived]
        if active() is not None:
            return _defended(heads, shares)
        mean: dict[str, Tensor] = {}
        for name, first in heads[0].items():
            value = first * shares[0]
            for other, share in zip(heads[1:], shares[1:], strict=True):
                value = value + other[name] * share
            mean[name] = value
        return mean


def _defended(
    heads: Sequence[Mapping[str, Tensor]], shares: Sequence[float]
) -> Mapping[str, Tensor]:
    """The heads' centre under a defence; heads are tensors ``[...]`` by name."""
    parts = [list(head.values()) for head in heads]
    weights = reweighed([part[0] for part in parts], lambda: plain_gram(parts), shares)
    found = {}
    for name, first in heads[0].items():
        found[name] = centred([head[name] for head in heads], weights).to(first.dtype)
    return found
