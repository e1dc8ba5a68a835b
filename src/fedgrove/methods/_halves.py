"""What FFA-LoRA, FedSA-LoRA and FedVLM share: one half of each factor pair travels.

The three share one shape: a factor that is averaged, and the other that is frozen at the shared
draw or stays with the client. Because the shared ``A`` is drawn from the job's seed, a frozen or a
starting ``A`` costs no message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
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
    reveal,
    shares,
)


class Half(Method):
    """Shares one factor (``shared``); the other is frozen or private."""

    reduce = "sum"
    stale = True
    Options: ClassVar[type[contract.Options]] = contract.WeightedOptions
    shared: ClassVar[str]
    private: ClassVar[str] = ""  # the factor that trains but stays

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"half": _half(self.setting.shared_draw(), self.shared)}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {"half": state["half"]}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        weights = shares(updates, self.options.weights)
        halves = [update.content["half"] for update in updates]
        return {
            "half": {
                site: _weighted([half[site] for half in halves], weights)
                for site in self.setting.sites
            }
        }

    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        adapter = trained[-1].adapter("adapter")
        stays = {"half": _half(adapter, self.private)} if self.private else mine
        return {"half": _half(adapter, self.shared)}, stays

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        adapter = self._joined(offer["half"], reveal(mine).get("half"))
        return Assembly(
            (Term("adapter", adapter, train=self.shared + self.private, kept=self.private),)
        )

    def global_assembly(self, state: State) -> Assembly | None:
        if self.private:
            return None
        return Assembly((Term("adapter", self._joined(state["half"], None)),))

    def _joined(self, shared: Mapping[str, Tensor], own: Mapping[str, Tensor] | None) -> Adapter:
        adapter = self.setting.shared_draw()
        other = "B" if self.shared == "A" else "A"
        for site, factors in adapter.items():
            adapter[site] = _with(factors, self.shared, shared[site])
            if own is not None:
                adapter[site] = _with(adapter[site], other, own[site])
        return adapter


def _half(adapter: Adapter, factor: str) -> dict[str, Tensor]:
    return {site: getattr(factors, factor) for site, factors in adapter.items()}


def _with(factors: Factors, factor: str, value: Tensor) -> Factors:
    return replace(factors, A=value) if factor == "A" else replace(factors, B=value)


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor * weight
    return total
