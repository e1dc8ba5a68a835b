"""FSLoRA: each client trains a random sketch of the global adapter, drawn anew each round.

Source: Fang et al., "Federated Sketching LoRA: On-Device Collaborative Fine-Tuning of Large
Language Models", arXiv
2501.19389. Client i runs ``W0 + s B S_i A`` with ``S_i = (R / k_i) diag(mask)``, the mask uniform
with ``k_i`` ones; the server adds the mean over all sampled clients of the changes ``dA_i, dB_i``,
which are zero outside the mask.
``k_i`` is the client's rank.

Where we differ: the masked-out modules have no part in the forward pass and no gradient, so a
client runs the ``k_i`` others as one dense adapter of scale ``s R / k_i`` and sends their changes
with their indices; weight decay then leaves the others alone too. One mask serves all sites. What a
client deploys is the whole global adapter. Public code finds the adapters by a test of their names
that never matches; ours has no such test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import select
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.ground.errors import JobError
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
    WeightedOptions,
    shares,
)


class SketchOptions(WeightedOptions):
    """FSLoRA's keys."""

    weights: Literal["examples", "uniform"] = Field(
        "uniform",
        description="Weight of a client in the mean: the same for all (the paper's), or its "
        "examples.",
    )


class FSLoRA(Method):
    name = "fslora"
    title = "FSLoRA"
    paper = "arXiv 2501.19389"
    trains = "r_i of R modules"
    shares = "their changes"
    keeps = "nothing"
    ranks = "mixed"
    Options: ClassVar[type[contract.Options]] = SketchOptions
    no_rule = (
        "it averages changes since the start of the round under random masks, which a "
        "directory does not hold"
    )

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        setting = self.setting
        for client in clients:
            if setting.scaling == "client" and client.rank != setting.rank:
                raise JobError(
                    f'lora.scaling = "client" gives {client.name} the scale alpha / {client.rank}, '
                    f"but the sketch "
                    f"corrects alpha / {setting.rank} for the smaller rank by itself; set "
                    f'lora.scaling = "global".'
                )

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"global": self.setting.shared_draw()}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {"global": state["global"]}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        weights = shares(updates, self.options.weights)
        result: Adapter = {}
        for site, old in state["global"].items():
            a, b = old.A.double().clone(), old.B.double().clone()
            for update, weight in zip(updates, weights, strict=True):
                change, row = update.content["change"][site], update.content["indices"]
                a[row] += weight * change["A"].double()
                b[:, row] += weight * change["B"].double()
            result[site] = Factors(a.to(old.A.dtype), b.to(old.B.dtype), old.scale)
        return {"global": result}

    def addend(self, content: dict[str, Any], offer: Offer) -> dict[str, Any]:
        whole: dict[str, dict[str, torch.Tensor]] = {}
        for site, change in content["change"].items():
            a, b = change["A"], change["B"]
            A, B = (
                a.new_zeros(self.setting.rank, a.shape[1]),
                b.new_zeros(b.shape[0], self.setting.rank),
            )
            A[content["indices"]], B[:, content["indices"]] = a, b
            whole[site] = {"A": A, "B": B}
        return {"change": whole, "indices": list(range(self.setting.rank))}

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("global", state["global"]),))

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        sketch = self.sketch(offer["global"], self.mask(client, round))
        return [Step(Assembly((Term("sketch", sketch),)))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        chosen = self.mask(client, round)
        start, end = self.sketch(offer["global"], chosen), trained[-1].adapter("sketch")
        change = {
            site: {"A": f.A - start[site].A, "B": f.B - start[site].B} for site, f in end.items()
        }
        return {"change": change, "indices": chosen}, mine

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("global", offer["global"]),))

    def mask(self, client: ClientInfo, round: int) -> list[int]:
        """The rank indices that the client trains in the round, ascending."""
        rng = self.setting.rng(round, client.name, "sketch")
        return sorted(torch.randperm(self.setting.rank, generator=rng)[: client.rank].tolist())

    def sketch(self, adapter: Adapter, chosen: Sequence[int]) -> Adapter:
        """The adapter ``B S A`` of the chosen modules alone."""
        stronger = self.setting.rank / len(chosen)
        return {s: replace(f, scale=f.scale * stronger) for s, f in select(adapter, chosen).items()}
