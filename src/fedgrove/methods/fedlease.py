"""FedLEASE: one LoRA expert per cluster of clients, and a router that takes as many experts as an
input needs.

Source: Wang et al., "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning",
arXiv 2509.15087. After a local warm-up, ``d_ij`` is the mean over sites of ``1 − cos(B_i, B_j)``;
average linkage, the number of clusters by silhouette in ``2..M_max``; an expert is the mean of its
cluster. A client trains its own expert, beside the frozen others, and a router ``G [2M − 1, in]``
per site: of ``softmax(G x)`` the ``M`` largest count, divided by their sum (as in the authors'
code), the first ``M`` outputs all standing for the own expert and one for each other. Expert and
router are averaged within the cluster.

Where we differ: routers start from one small random draw (as a linear layer does). Too few clients
for a silhouette (fewer than three) make one cluster, and one cluster needs no router. The warm-up
counts in the budget; in it everybody trains, and only its last round sends. An expert that no
member of its cluster trained in a round keeps its value. A newcomer trains one probe round and
joins the expert whose ``B`` after the warm-up is closest; before that it runs the even mix of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Mix, Term, Weighted
from fedgrove.adapters.distance import between, towards
from fedgrove.clustering.tree import cut, merge_tree, silhouette
from fedgrove.ground.errors import JobError
from fedgrove.ground.plain import Plain
from fedgrove.methods import contract
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Plan,
    Setting,
    Step,
    Trained,
    Update,
    draw,
    shares,
)
from fedgrove.methods.records import Own

Tensors = dict[str, Tensor]  # by site


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
        True,
        description="Divide the weights of the chosen router outputs by their sum, so that they "
        "add up to 1, as the authors' code does; false takes them as the softmax gives them.",
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
    normalise: bool = True

    linear = False

    def weigh(self, at: Junction) -> Sequence[float | Tensor]:
        """As in Mix, each [batch, tokens, 1]."""
        router = at.extras[f"router.{at.site.name}"]
        logits = torch.nn.functional.linear(at.x, router)
        shares = torch.softmax(logits, dim=-1)
        top = shares.topk(self.count, dim=-1)
        nothing = torch.zeros_like(shares)
        kept = nothing.scatter(-1, top.indices, top.values)
        if self.normalise:
            kept = kept / kept.sum(-1, keepdim=True)
        own = kept[..., : self.count].sum(-1, keepdim=True)
        weights = kept[..., self.count :].split(1, dim=-1)
        others = [n for n in range(self.count) if n != self.own]
        named = {f"expert.{self.own}": own}
        for n, weight in zip(others, weights, strict=True):
            named[f"expert.{n}"] = weight
        return [named[term] for term in at.terms]


@dataclass(frozen=True, eq=False)
class LEASEState:
    """The server's memory; all of it is empty until the clusters are made."""

    labels: dict[str, int] = field(default_factory=dict)  # client -> its cluster
    experts: list[Adapter] = field(default_factory=list)  # one for each cluster
    routers: list[Tensors] = field(default_factory=list)  # site -> [2M - 1, in]; none with M = 1
    anchors: list[Tensors] = field(default_factory=list)  # each expert's first B, [out, rank]
    scores: dict[str, float] = field(default_factory=dict)  # silhouette by number of clusters


@dataclass(frozen=True, eq=False)
class Experts:
    """What goes down: nothing before there are clusters. A newcomer has no label yet."""

    experts: list[Adapter] = field(default_factory=list)
    label: int | None = None
    router: Tensors = field(default_factory=dict)  # that of the label's cluster
    placed: str = ""


@dataclass(frozen=True, eq=False)
class Expert:
    """What goes up: the own expert and its router; in the warm-up, the own adapter at its end."""

    expert: Adapter = field(default_factory=dict)
    router: Tensors = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Bases:
    """What a newcomer's probe sends: its B at each site, [out, rank]."""

    B: Tensors


class FedLEASE(Method):
    name = "fedlease"
    title = "FedLEASE"
    laid_out = ("warmup",)
    paper = "arXiv 2509.15087"
    trains = "own expert A, B; router"
    shares = "expert, router"
    keeps = "nothing"
    mixes = (TopExperts,)
    State, Offer, Mine, Sent, Probed = LEASEState, Experts, Own, Expert, Bases
    Options: ClassVar[type[contract.Options]] = LEASEOptions
    no_rule = "it averages routers beside the adapters, and a PEFT adapter directory holds none"

    def __init__(self, options: LEASEOptions, setting: Setting):
        super().__init__(options, setting)
        self.warmup = max(1, min(5, setting.rounds // 3))
        if options.warmup_rounds is not None:
            self.warmup = options.warmup_rounds
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

    @property
    def complete_from(self) -> int:
        return self.warmup + 1

    # ------------------------------------------------------------------ server
    def needs_each(self) -> str:
        return "its experts are clusters of the clients' own updates"

    def most_rows(self) -> int:
        most = self.options.experts or self.options.max_experts
        return 2 * most - 1

    def begin(self, clients: Sequence[ClientInfo]) -> LEASEState:
        if self.warmup:
            return LEASEState()
        return LEASEState({client.name: 0 for client in clients}, [self.setting.shared_draw()])

    def select(
        self,
        state: LEASEState,
        round: int,
        available: Sequence[str],
        fraction: float,
    ) -> list[str]:
        if round <= self.warmup:
            return list(available)
        return draw(available, fraction, self.setting.rng(round, "select"))

    def offer(
        self,
        state: LEASEState,
        round: int,
        client: ClientInfo,
    ) -> Experts:
        return self._of_cluster(state, state.labels.get(client.name))

    def _of_cluster(self, state: LEASEState, label: int | None) -> Experts:
        if not state.experts:
            return Experts()
        if label is None or not state.routers:
            return Experts(state.experts, label)
        return Experts(state.experts, label, state.routers[label])

    def aggregate(
        self,
        state: LEASEState,
        round: int,
        updates: Sequence[Update[Expert]],
    ) -> LEASEState:
        if round < self.warmup:
            return state
        if round == self.warmup:
            return self._group(updates)
        experts, routers = list(state.experts), list(state.routers)
        for number in range(len(experts)):
            members = [each for each in updates if state.labels[each.client] == number]
            if not members:
                continue
            weights = shares(members, self.options.weights)
            experts[number] = mean([each.content.expert for each in members], weights)
            if routers:
                routers[number] = _mean_tensors([each.content.router for each in members], weights)
        return replace(state, experts=experts, routers=routers)

    def welcome(
        self,
        state: LEASEState,
        client: ClientInfo,
        probe: Bases | None,
    ) -> Experts:
        if len(state.experts) == 1:
            return self._of_cluster(state, 0)
        if probe is None or not state.experts:
            return self._of_cluster(state, None)
        distances = towards(probe.B, state.anchors, self.setting.sites, "cosine").mean(0)
        label = int(distances.argmin())
        listed = ", ".join(f"{value:.3f}" for value in distances.tolist())
        where = f"expert {label} of {len(state.experts)} (1 − cos with each: {listed})"
        return replace(self._of_cluster(state, label), placed=where)

    def artefacts(self, state: LEASEState) -> Plain:
        """``experts.json``: the clusters and the silhouettes that chose their number."""
        if not state.experts:
            return {}
        found = {
            "labels": dict(state.labels),
            "count": len(state.experts),
            "silhouettes": dict(state.scores),
        }
        return {"experts.json": found}

    def _group(self, updates: Sequence[Update[Expert]]) -> LEASEState:
        """The clusters, once, from what everybody trained in the warm-up."""
        adapters = [_up(each.content.expert) for each in updates]
        by_layer = between(adapters, self.setting.sites, "cosine")
        distances = by_layer.mean(0).numpy()
        tree = merge_tree(distances)
        most = min(self.options.max_experts, len(updates) - 1)
        scores: dict[str, float] = {}
        for groups in range(2, most + 1):
            labels_of = cut(tree, groups)
            scores[str(groups)] = silhouette(labels_of, distances)
        count = self._count(scores, len(updates))
        labels = cut(tree, count).tolist()
        experts = [self._expert(updates, labels, number) for number in range(count)]
        routers = []
        if count > 1:
            routers = [self._router(count) for _ in experts]
        names = [each.client for each in updates]
        return LEASEState(
            labels=dict(zip(names, labels, strict=True)),
            experts=experts,
            routers=routers,
            anchors=[_up(expert) for expert in experts],
            scores=scores,
        )

    def _count(self, scores: Mapping[str, float], clients: int) -> int:
        """How many experts: as the job says, or the best silhouette (ties: fewer)."""
        wanted: int | None = self.options.experts
        if wanted is not None:
            return min(wanted, clients)
        counts = [int(count) for count in scores]
        return max(
            counts,
            key=lambda count: (scores[str(count)], -count),
            default=1,
        )

    def _expert(
        self,
        updates: Sequence[Update[Expert]],
        labels: Sequence[int],
        number: int,
    ) -> Adapter:
        """The mean of one cluster's members."""
        pairs = zip(updates, labels, strict=True)
        members = [each for each, label in pairs if label == number]
        weights = shares(members, self.options.weights)
        return mean([each.content.expert for each in members], weights)

    def _router(self, experts: int) -> Tensors:
        """One draw for all clusters: uniform within ``1 / sqrt(in)``, as a new linear layer has;
        site -> [2M − 1, in].
        """
        rng = self.setting.rng("router")
        result: Tensors = {}
        for name in sorted(self.setting.sites):
            width = self.setting.sites[name].in_features
            uniform = 2 * torch.rand(2 * experts - 1, width, generator=rng) - 1
            result[name] = uniform * width**-0.5
        return result

    # ------------------------------------------------------------------ client
    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Experts,
        mine: Own,
        round: int,
    ) -> tuple[Expert, Own]:
        last = trained[-1]
        if not offer.experts:
            own = last.adapter("own")
            if round == self.warmup:
                return Expert(own), Own(own)
            return Expert(), Own(own)
        router = {site: last.extra(f"router.{site}") for site in offer.router}
        return Expert(last.adapter(f"expert.{offer.label}"), router), Own()

    def probe(self, client: ClientInfo, offer: Experts) -> Plan | None:
        """One training of an adapter alone, as in the warm-up."""
        if offer.label is not None or not offer.experts:
            return None
        return [Step(Assembly((Term("own", self.setting.shared_draw()),)))]

    def probe_report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Experts,
    ) -> Bases:
        return Bases(_up(trained[-1].adapter("own")))

    def personal(
        self,
        client: ClientInfo,
        offer: Experts,
        mine: Own,
    ) -> Assembly:
        if not offer.experts:
            return Assembly((Term("own", mine.own or self.setting.shared_draw()),))
        terms = tuple(_term(number, each, offer) for number, each in enumerate(offer.experts))
        if len(terms) == 1:
            return Assembly(terms)
        if offer.label is None:
            return Assembly(terms, Weighted({term.name: 1 / len(terms) for term in terms}))
        routers = {
            f"router.{site}": Extra(G, home="server", lr=1.0) for site, G in offer.router.items()
        }
        mix = TopExperts(offer.label, len(terms), self.options.normalise)
        return Assembly(terms, mix, routers)


def _term(
    number: int,
    expert: Adapter,
    offer: Experts,
) -> Term:
    """An expert as the client runs it: its own trains, and all do of who has none."""
    if offer.label in (number, None):
        return Term(f"expert.{number}", expert)
    return Term(f"expert.{number}", expert, train="")


def _up(adapter: Adapter) -> Tensors:
    """B [out, rank] at each site."""
    return {site: factors.B for site, factors in adapter.items()}


def _mean_tensors(
    parts: Sequence[Mapping[str, Float[Tensor, "*any"]]],
    weights: Sequence[float],
) -> Tensors:
    """The weighted mean of each tensor, summed in float64; the weights add up to 1."""
    result: Tensors = {}
    for name, first in parts[0].items():
        total = torch.zeros(())
        for part, weight in zip(parts, weights, strict=True):
            total = total + weight * part[name].double()
        result[name] = total.to(first)
    return result
