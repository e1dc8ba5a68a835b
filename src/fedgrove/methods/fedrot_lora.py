"""FedRot-LoRA: every client turns its rank space to the last global one before the factors are
averaged.

Source: Zhang et al., "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA", arXiv
2602.23638. Odd rounds align A, even ones B, to the last global factors, by a soft Procrustes
rotation R; the client sends ``(R^T A, B R)``, whose product is that of ``(A, B)``. The first round
is skipped: the global B is still zero.

Where we differ: ``at = "server"`` runs the same arithmetic at the server, for clients that only
know FedIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.rotation import align
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Mine,
    Trained,
    Update,
    WeightedOptions,
    shares,
)
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.protocols import EACH
from fedgrove.methods.records import OneAdapter, Whole


class RotOptions(WeightedOptions):
    """FedRot-LoRA's keys."""

    lam: float = Field(
        0.5, ge=0, le=1, description="Strength of the rotation: 0 is FedIT, 1 the full rotation."
    )
    at: Literal["client", "server"] = Field(
        "client", description="Who rotates; the result is the same."
    )


class FedRotLoRA(FedIT):
    name = "fedrot-lora"
    title = "FedRot-LoRA"
    paper = "arXiv 2602.23638"
    stale = False
    averages_factors = False  # of the rotated ones, which no client runs
    Options: ClassVar[type[contract.Options]] = RotOptions

    def needs_each(self) -> str:
        return EACH

    def aggregate(self, state: Whole, round: int, updates: Sequence[Update[OneAdapter]]) -> Whole:
        adapters = [update.content.adapter for update in updates]
        if self.options.at == "server":
            adapters = [self._rotated(adapter, state.whole, round) for adapter in adapters]
        return Whole(mean(adapters, shares(updates, self.options.weights)))

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Whole, mine: Mine, round: int
    ) -> tuple[OneAdapter, Mine]:
        adapter = trained[-1].adapter("global")
        if self.options.at == "client":
            adapter = self._rotated(adapter, offer.whole, round)
        return OneAdapter(adapter), mine

    def _rotated(self, adapter: Adapter, reference: Adapter, round: int) -> Adapter:
        """The adapter with its rank space turned to that of the round's global one."""
        if round == 1:
            return adapter
        factor: Literal["A", "B"] = "A" if round % 2 else "B"
        return {
            site: align(f, reference[site], factor, self.options.lam) for site, f in adapter.items()
        }
