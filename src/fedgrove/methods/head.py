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
from typing import Any, Literal

from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra
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
        return self.mode == "shared" or (self.mode == "local" and self.newcomers)

    # ------------------------------------------------------------------ client
    def attach(
        self,
        assembly: Assembly,
        offer: Mapping[str, Any],
        store: Mapping[str, Any],
        train: bool = True,
    ) -> Assembly:
        """The assembly with this client's head as extras named ``head.*``."""
        head = self._current(offer, store)
        if self.travels:
            home: Literal["server", "client"] = "server"
        else:
            home = "client"
        extras = {
            PREFIX + name: Extra(value, train=train and self.mode != "frozen", home=home, lr=None)
            for name, value in head.items()
        }
        return assembly.with_extras(extras)

    def step(self, step: Step, offer: Mapping[str, Any], store: Mapping[str, Any]) -> Step:
        return replace(step, assembly=self.attach(step.assembly, offer, store, train=step.head))

    def after(self, assembly: Assembly) -> dict[str, Tensor]:
        """The head out of a trained assembly."""
        return {
            n.removeprefix(PREFIX): e.value
            for n, e in assembly.extras.items()
            if n.startswith(PREFIX)
        }

    def _current(self, offer: Mapping[str, Any], store: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if self.mode == "local" and "head" in store:
            head: Mapping[str, Tensor] = store["head"]
            return head
        return offer.get("head") or self.initial

    # ------------------------------------------------------------------ server
    def offer(
        self, head: Mapping[str, Tensor] | None, newcomer: bool
    ) -> Mapping[str, Tensor] | None:
        """What goes down: the mean, each round where it is shared, once to a newcomer where heads
        are local.
        """
        if self.mode == "shared" or (self.mode == "local" and newcomer and self.newcomers):
            return head
        return None

    def beside(
        self, content: Offer, head: Mapping[str, Tensor] | None, *, newcomer: bool
    ) -> dict[str, Any]:
        """A whole offer: the method's part, and the head where one goes down."""
        offered = self.offer(head, newcomer)
        if offered:
            return {"method": content, "head": dict(offered)}
        return {"method": content}

    def aggregate(
        self, head: Mapping[str, Tensor] | None, updates: Sequence[Update]
    ) -> Mapping[str, Tensor] | None:
        """The mean of the heads that arrived, weighted by examples."""
        arrived = [
            (update.examples, update.content["head"])
            for update in updates
            if "head" in update.content
        ]
        if not self.travels or not arrived:
            return head
        total = sum(examples for examples, _ in arrived)
        return {
            name: sum(
                (h[name] * (examples / total) for examples, h in arrived[1:]),
                arrived[0][1][name] * (arrived[0][0] / total),
            )
            for name in arrived[0][1]
        }
