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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term, Weighted
from fedgrove.adapters.groups import group_means
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Plan,
    Probed,
    Step,
    Trained,
    Update,
)
from fedgrove.methods.records import OneAdapter


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
        """As in Mix, each [batch, tokens, 1]."""
        gate = at.extras[f"gate.{at.site.name}"]
        logits = torch.nn.functional.linear(at.x, gate)
        shares = torch.softmax(logits, dim=-1)
        own, rest = shares.split(1, dim=-1)
        named = {"own": own, "rest": rest}
        return [named[term] for term in at.terms]


@dataclass(frozen=True, eq=False)
class ALTState:
    """The server's memory by client, in the order of the names; and, once ``open`` made them, the
    mean of the others for each client and that of everyone, both empty before anybody has sent.
    """

    latest: dict[str, Adapter] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    rest: dict[str, Adapter] = field(default_factory=dict)
    everyone: Adapter = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Rest:
    """The mean of the others; empty where there is none."""

    rest: Adapter = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class OwnAndGates:
    """What stays with a client: its LoRA, and the gates [2, in] by the names of their extras."""

    own: Adapter | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)


class FedALT(Method):
    name = "fedalt"
    title = "FedALT"
    paper = "arXiv 2503.11880"
    trains = "own A, B; gates"
    shares = "a copy of A, B"
    keeps = "own A, B; gates"
    mixes = (Gated,)
    State, Offer, Mine, Sent = ALTState, Rest, OwnAndGates, OneAdapter
    Options: ClassVar[type[contract.Options]] = ALTOptions
    no_rule = (
        "a client keeps two adapters and a gate that depends on the input, which is no single "
        "PEFT adapter"
    )

    # ------------------------------------------------------------------ server
    def needs_each(self) -> str:
        return "each client gets the mean of all the others"

    def open(self, state: ALTState, round: int) -> ALTState:
        names = list(state.latest)
        if not names:
            return state
        weights = [1.0] * len(names)
        if self.options.weights == "examples":
            weights = [float(state.examples[name]) for name in names]
        means = group_means(
            list(state.latest.values()),
            range(len(names)),
            weights,
        )
        rest = dict(zip(names, means.rest, strict=True))
        return replace(state, rest=rest, everyone=means.everyone)

    def offer(
        self,
        state: ALTState,
        round: int,
        client: ClientInfo,
    ) -> Rest:
        if self.options.gate == "own":
            return Rest()
        return Rest(state.rest.get(client.name, state.everyone))

    def aggregate(
        self,
        state: ALTState,
        round: int,
        updates: Sequence[Update[OneAdapter]],
    ) -> ALTState:
        latest, examples = dict(state.latest), dict(state.examples)
        for each in updates:
            examples[each.client] = each.examples
            if each.content.adapter:
                latest[each.client] = each.content.adapter
        return ALTState(dict(sorted(latest.items())), dict(sorted(examples.items())))

    def welcome(
        self,
        state: ALTState,
        client: ClientInfo,
        probe: Probed | None,
    ) -> Rest:
        return Rest(state.everyone)

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Rest,
        mine: OwnAndGates,
        round: int,
    ) -> Plan:
        return [Step(self._assembly(client, offer, mine))]

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Rest,
        mine: OwnAndGates,
        round: int,
    ) -> tuple[OneAdapter, OwnAndGates]:
        own = trained[-1].adapter("own")
        extras = trained[-1].assembly.extras
        gates = {name: each.value for name, each in extras.items() if name.startswith("gate.")}
        if self.options.gate == "own":
            return OneAdapter(), OwnAndGates(own, gates)
        return OneAdapter(own), OwnAndGates(own, gates)

    def personal(
        self,
        client: ClientInfo,
        offer: Rest,
        mine: OwnAndGates,
    ) -> Assembly:
        if mine.own is None and offer.rest:
            return Assembly((Term("rest", offer.rest),))
        return self._assembly(client, offer, mine)

    def _assembly(
        self,
        client: ClientInfo,
        offer: Rest,
        mine: OwnAndGates,
    ) -> Assembly:
        own = Term("own", mine.own or self.setting.shared_draw(client.rank))
        if self.options.gate == "own":
            return Assembly((own,))
        terms = (own, Term("rest", offer.rest or self.setting.shared_draw(client.rank), train=""))
        if self.options.gate == "even":
            return Assembly(terms, Weighted({"own": 0.5, "rest": 0.5}))
        gates = mine.gates or {
            f"gate.{name}": torch.zeros(2, site.in_features)
            for name, site in self.setting.sites.items()
        }
        return Assembly(
            terms,
            Gated(),
            {name: Extra(gate, lr=1.0) for name, gate in gates.items()},
        )
