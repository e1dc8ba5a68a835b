"""FedLEASE: one LoRA expert per cluster of clients, and a router that takes as many experts as an
input needs.

Source: Wang et al., "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning",
arXiv 2509.15087. After a local warm-up, ``d_ij`` is the mean over sites of ``1 − cos(B_i, B_j)``;
average linkage, the number of clusters by silhouette in ``2..M_max``; an expert is the mean of its
cluster. A client trains its own expert, beside the frozen others, and a router ``G [2M − 1, in]``
per site: of ``softmax(G x)`` the ``M`` largest count, the first ``M`` outputs all standing for the
own expert and one for each other. Expert and router are averaged within the cluster.

Where we differ: routers start from one small random draw (as a linear layer does). Too few clients
for a silhouette (fewer than three) make one cluster, and one cluster needs no router. The warm-up
counts in the budget; in it everybody trains, and only its last round sends. An expert that no
member of its cluster trained in a round keeps its value. A newcomer trains one probe round and
joins the expert whose ``B`` after the warm-up is closest; before that it runs the even mix of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term, Weighted
from fedgrove.adapters.distance import between, towards
from fedgrove.clustering.tree import cut, merge_tree, silhouette
from fedgrove.ground.errors import JobError
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Plan,
    Setting,
    State,
    Step,
    Trained,
    Update,
    draw,
    shares,
)


class LEASEOptions(contract.WeightedOptions):
    warmup_rounds: int | None = Field(
        None,
        ge=0,
        description="Rounds of local training before the clusters. Not set: a third of run.rounds, "
        "between 1 and 5; 0 "
        "only with experts = 1.",
        examples=[2],
    )
    max_experts: int = Field(
        8, ge=2, description="M_max: most experts; never more than the clients less one."
    )
    experts: int | None = Field(
        None,
        ge=1,
        description="This many experts. Not set: chosen by the silhouette.",
        examples=[3],
    )
    normalise: bool = Field(
        False,
        description="Divide the weights of the chosen router outputs by their sum, so that they "
        "add up to 1.",
    )


@dataclass(frozen=True)
class TopExperts(Mix):
    """The ``count`` largest of ``softmax(G x)``, G [2 · count − 1, in] being the extra
    ``router.<site>``.

    The first ``count`` outputs weigh the term ``expert.<own>``, the others the other experts in
    their order.
    """

    own: int
    count: int
    normalise: bool = False

    linear = False

    def weigh(self, at: Junction) -> Sequence[float | Tensor]:
        shares = torch.softmax(
            torch.nn.functional.linear(at.x, at.extras[f"router.{at.site.name}"]), dim=-1
        )
        top = shares.topk(self.count, dim=-1)
        kept = torch.zeros_like(shares).scatter(-1, top.indices, top.values)
        if self.normalise:
            kept = kept / kept.sum(-1, keepdim=True)
        weights = (
            kept[..., : self.count].sum(-1, keepdim=True),
            *kept[..., self.count :].split(1, dim=-1),
        )
        order = [self.own, *(n for n in range(self.count) if n != self.own)]
        named = {f"expert.{n}": weight for n, weight in zip(order, weights, strict=True)}
        return [named[term] for term in at.terms]


class FedLEASE(Method):
    name = "fedlease"
    title = "FedLEASE"
    paper = "arXiv 2509.15087"
    trains = "own expert A, B; router"
    shares = "expert, router"
    keeps = "nothing"
    mixes = (TopExperts,)
    Options: ClassVar[type[contract.Options]] = LEASEOptions
    no_rule = "it averages routers beside the adapters, and a PEFT adapter directory holds none"

    def __init__(self, options: Any, setting: Setting):
        super().__init__(options, setting)
        default = max(1, min(5, setting.rounds // 3))
        self.warmup: int = default if options.warmup_rounds is None else options.warmup_rounds
        if self.warmup > setting.rounds:
            raise JobError(
                f"method.warmup_rounds = {self.warmup} is more than run.rounds = {setting.rounds}; "
                f"lower it."
            )
        if self.warmup == 0 and options.experts != 1:
            raise JobError(
                "method.warmup_rounds = 0 leaves nothing to group the clients by; set it to 1 or "
                "more, or "
                "method.experts = 1."
            )

    # ------------------------------------------------------------------ server
    def needs_each(self) -> str:
        return "its experts are clusters of the clients' own updates"

    def most_rows(self) -> int:
        most = self.options.experts or self.options.max_experts
        return 2 * most - 1

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        state: State = {"labels": {}, "experts": [], "routers": [], "anchors": [], "scores": {}}
        if self.warmup:
            return state
        return {
            **state,
            "labels": {c.name: 0 for c in clients},
            "experts": [self.setting.shared_draw()],
        }

    def select(
        self, state: State, round: int, available: Sequence[str], fraction: float
    ) -> list[str]:
        if round <= self.warmup:
            return list(available)
        return draw(available, fraction, self.setting.rng(round, "select"))

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        if not state["experts"]:
            return {}
        label = state["labels"].get(client.name)
        return self._placed(state, label)

    def _placed(self, state: State, label: int | None) -> Offer:
        offer: Offer = {"experts": state["experts"], "label": label}
        if label is not None and state["routers"]:
            offer["router"] = state["routers"][label]
        return offer

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        if round < self.warmup:
            return state
        if round == self.warmup:
            return self._group(updates)
        experts, routers = list(state["experts"]), list(state["routers"])
        for number in range(len(experts)):
            members = [u for u in updates if state["labels"][u.client] == number]
            if not members:
                continue
            weights = shares(members, self.options.weights)
            experts[number] = mean([u.content["expert"] for u in members], weights)
            if routers:
                routers[number] = _mean_tensors([u.content["router"] for u in members], weights)
        return {**state, "experts": experts, "routers": routers}

    def welcome(self, state: State, client: ClientInfo, probe: Mapping[str, Any] | None) -> Offer:
        if not state["experts"]:
            return {}
        if len(state["experts"]) == 1:
            return self._placed(state, 0)
        if probe is None:
            return self._placed(state, None)
        distances = towards(probe["B"], state["anchors"], self.setting.sites, "cosine").mean(0)
        label = int(distances.argmin())
        offer = self._placed(state, label)
        listed = ", ".join(f"{value:.3f}" for value in distances.tolist())
        offer["placed"] = f"expert {label} of {len(state['experts'])} (1 − cos with each: {listed})"
        return offer

    def artefacts(self, state: State) -> dict[str, Any]:
        if not state["experts"]:
            return {}
        labels, scores = state["labels"], state["scores"]
        return {
            "experts.json": {
                "labels": dict(labels),
                "count": len(state["experts"]),
                "silhouettes": dict(scores),
            }
        }

    def _group(self, updates: Sequence[Update]) -> State:
        """The clusters, once, from what everybody trained in the warm-up."""
        adapters = [update.content["expert"] for update in updates]
        bases = [{site: factors.B for site, factors in adapter.items()} for adapter in adapters]
        distances = between(bases, self.setting.sites, "cosine").mean(0).numpy()
        tree = merge_tree(distances)
        wanted, clients = self.options.experts, len(updates)
        scores = {
            str(count): silhouette(cut(tree, count), distances)
            for count in range(2, min(self.options.max_experts, clients - 1) + 1)
        }
        if wanted is not None:
            count = min(wanted, clients)
        else:
            count = max((int(c) for c in scores), key=lambda c: (scores[str(c)], -c), default=1)
        labels = cut(tree, count).tolist()
        groups = [
            [n for n, label in enumerate(labels) if label == number] for number in range(count)
        ]
        experts = [
            mean(
                [adapters[n] for n in group],
                shares([updates[n] for n in group], self.options.weights),
            )
            for group in groups
        ]
        return {
            "labels": {
                update.client: int(label) for update, label in zip(updates, labels, strict=True)
            },
            "experts": experts,
            "routers": [self._router(count) for _ in experts] if count > 1 else [],
            "anchors": [
                {site: factors.B for site, factors in expert.items()} for expert in experts
            ],
            "scores": scores,
        }

    def _router(self, experts: int) -> dict[str, Tensor]:
        """One draw for all clusters: uniform within ``1 / sqrt(in)``, as a new linear layer has."""
        rng = self.setting.rng("router")
        result = {}
        for name in sorted(self.setting.sites):
            width = self.setting.sites[name].in_features
            result[name] = (2 * torch.rand(2 * experts - 1, width, generator=rng) - 1) * width**-0.5
        return result

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        return [Step(self.personal(client, offer, mine))]

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        last = trained[-1]
        if "experts" not in offer:
            own = last.adapter("own")
            return ({"expert": own} if round == self.warmup else {}), {"own": own}
        up: dict[str, Any] = {"expert": last.adapter(f"expert.{offer['label']}")}
        if "router" in offer:
            up["router"] = {site: last.extra(f"router.{site}") for site in offer["router"]}
        return up, {}

    def probe(self, client: ClientInfo, offer: Offer) -> Plan | None:
        if offer.get("label") is not None or "experts" not in offer:
            return None
        return [Step(Assembly((Term("own", self.setting.shared_draw()),)))]

    def probe_report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer
    ) -> dict[str, Any]:
        return {"B": {site: factors.B for site, factors in trained[-1].adapter("own").items()}}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        if "experts" not in offer:
            own: Adapter = mine["own"] if "own" in mine else self.setting.shared_draw()
            return Assembly((Term("own", own),))
        experts, label = offer["experts"], offer["label"]
        terms = tuple(
            Term(f"expert.{n}", expert, train="AB" if label in (n, None) else "")
            for n, expert in enumerate(experts)
        )
        if len(experts) == 1:
            return Assembly(terms)
        if label is None:
            return Assembly(terms, Weighted({term.name: 1 / len(terms) for term in terms}))
        routers = {
            f"router.{site}": Extra(G, home="server", lr=1.0) for site, G in offer["router"].items()
        }
        return Assembly(terms, TopExperts(label, len(experts), self.options.normalise), routers)


def _mean_tensors(
    parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The weighted mean of each tensor, summed in float64; the weights add up to 1."""
    return {
        name: sum(
            (w * each[name].double() for each, w in zip(parts, weights, strict=True)),
            torch.zeros(()),
        ).to(first)
        for name, first in parts[0].items()
    }
