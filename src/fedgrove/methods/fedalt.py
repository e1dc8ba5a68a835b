"""FedALT: a client's own LoRA is never overwritten; a frozen rest-of-world LoRA stands beside it,
mixed by a gate.

Source: Bian et al., "FedALT: Federated Fine-Tuning through Adaptive Local Training with
Rest-of-World LoRA", arXiv
2503.11880. Each round a client gets the mean of the *others'* ``A`` and of their ``B``, frozen, and
trains its own LoRA and, at each site, a gate ``G [2, in]``: ``h = W0 x + α s B A x + (1 − α) s
B_rest A_rest x`` with
``(α, 1 − α) = softmax(G x)`` for each token. A copy of its own LoRA travels up; the gate never
does.

Where we differ: gates start at zero, so at an even mix; absent clients count with what they sent
last; before anybody has sent anything the rest of the world is the shared draw, whose update is
zero. A newcomer deploys the mean of everybody until it trains. ``gate = "even"`` and ``"own"`` are
ablations; the latter is Local, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term, Weighted
from fedgrove.adapters.groups import group_means
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
)


class ALTOptions(contract.Options):
    weights: Literal["uniform", "examples"] = Field(
        "uniform",
        description="Weight of each other client in the rest of the world: the same, or its "
        "examples.",
    )
    gate: Literal["input", "even", "own"] = Field(
        "input",
        description="What weighs the own LoRA against the rest of the world: the trained gate, one "
        "half each, or the "
        "own LoRA alone.",
    )


@dataclass(frozen=True)
class Gated(Mix):
    """``softmax(G x)`` over the terms ``own`` and ``rest``; G [2, in] is the extra
    ``gate.<site>``.
    """

    linear = False

    def weigh(self, at: Junction) -> Sequence[float | Tensor]:
        weights = torch.softmax(
            torch.nn.functional.linear(at.x, at.extras[f"gate.{at.site.name}"]), dim=-1
        )
        return [weights[..., :1] if term == "own" else weights[..., 1:] for term in at.terms]


class FedALT(Method):
    name = "fedalt"
    title = "FedALT"
    paper = "arXiv 2503.11880"
    trains = "own A, B; gates"
    shares = "a copy of A, B"
    keeps = "own A, B; gates"
    mixes = (Gated,)
    Options: ClassVar[type[contract.Options]] = ALTOptions
    no_rule = (
        "a client keeps two adapters and a gate that depends on the input, which is no single "
        "PEFT adapter"
    )

    # ------------------------------------------------------------------ server
    def needs_each(self) -> str:
        return "each client gets the mean of all the others"

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"latest": {}, "examples": {}}

    def open(self, state: State, round: int) -> State:
        """With ``rest``, the mean of the others for each client that has sent something, and
        ``everyone``, the mean of all; both empty before anybody has.
        """
        names = list(state["latest"])
        if not names:
            return {**state, "rest": {}, "everyone": {}}
        weights = [1.0] * len(names)
        if self.options.weights == "examples":
            weights = [float(state["examples"][name]) for name in names]
        means = group_means(list(state["latest"].values()), range(len(names)), weights)
        return {
            **state,
            "rest": dict(zip(names, means.rest, strict=True)),
            "everyone": means.everyone,
        }

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        rest = state["rest"].get(client.name, state["everyone"])
        return {"rest": rest} if rest and self.options.gate != "own" else {}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        latest = {
            **state["latest"],
            **{u.client: u.content["adapter"] for u in updates if u.content},
        }
        examples = {**state["examples"], **{u.client: u.examples for u in updates}}
        return {"latest": dict(sorted(latest.items())), "examples": dict(sorted(examples.items()))}

    def welcome(self, state: State, client: ClientInfo, probe: Mapping[str, Any] | None) -> Offer:
        return {"rest": state["everyone"]} if state["everyone"] else {}

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self._assembly(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        own = trained[-1].adapter("own")
        gates = {
            name: e.value
            for name, e in trained[-1].assembly.extras.items()
            if name.startswith("gate.")
        }
        up = {} if self.options.gate == "own" else {"adapter": own}
        return up, {"own": own, "gates": gates}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        if "own" not in mine and "rest" in offer:
            return Assembly((Term("rest", offer["rest"]),))
        return self._assembly(client, offer, mine)

    def _assembly(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        own = Term("own", mine["own"] if "own" in mine else self.setting.shared_draw(client.rank))
        if self.options.gate == "own":
            return Assembly((own,))
        rest = Term(
            "rest",
            offer["rest"] if "rest" in offer else self.setting.shared_draw(client.rank),
            train="",
        )
        if self.options.gate == "even":
            return Assembly((own, rest), Weighted({"own": 0.5, "rest": 0.5}))
        gates = mine.get("gates") or {
            f"gate.{name}": torch.zeros(2, site.in_features)
            for name, site in self.setting.sites.items()
        }
        return Assembly(
            (own, rest), Gated(), {name: Extra(gate, lr=1.0) for name, gate in gates.items()}
        )
