"""FedTreeLoRA: clients share one trunk in shallow layers and split into branches as layers get
deeper.

Source: "FedTreeLoRA", arXiv 2603.13282 (ICML 2026). After a local warm-up from one shared draw, a
merge tree of the clients is built from the distances between their ``B``; each layer, shallow to
deep, cuts that one tree where its own distances say, never coarser than the layer before. In every
layer a client runs
``λ · (mean of its group) + (1 − λ) · (mean of everyone else)``, trains the first and λ, and sends
the first.

Where we differ, or choose what the paper leaves open:

* Average linkage; ``tau`` 0.1, ``K`` 3; a warm-up of ``min(5, rounds // 3)`` rounds (at least 1
  where a layer may split), counted in the budget. Its adapters travel once, after its last round:
  before, nobody has a use for them.
* λ is the sigmoid of a free scalar that starts at 0, one per layer and client, and never leaves it.
  A layer that is not split has no scalar and no external expert, which pins λ to 1. A scalar needs
  a larger learning rate than a matrix to get anywhere in a few dozen steps: ``lambda_lr``.
* Absent clients: experts are means over *all* members' latest adapters, which the server keeps.
* Clients that come later, in the run or after it: they train as many rounds as the warm-up had,
  alone and from the shared draw, send their ``B`` and descend the tree by its average distance to
  the members' ``B`` *after the members' own warm-up*, since only these have the same history. One
  path from the root gives one group per layer, still nested. Their warm-up is never averaged into a
  group that is further on: they count from their first trained expert.
* One or two clients always share everything (``c ≤ N − 1``).
* Cluster and external expert are renewed at the same time, as published, so what a client deploys
  is not what it trained: with two groups and λ = ½ both deploy ``(C_1 + C_2) / 2`` (docs/results.md
  has the arithmetic). ``external_update`` and ``external_damping`` are the repairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Site
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Convex, Extra, Term
from fedgrove.adapters.distance import Distance, between, layers_of, towards
from fedgrove.adapters.groups import group_means
from fedgrove.clustering.tree import LayerCut, descend, layer_cuts, merge_tree, nearest, untied_cuts
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
    keep,
    reveal,
)
from fedgrove.methods.rule import Arrived, Needs, Outcome, Round, ServerRule


class TreeOptions(contract.Options):
    """The keys of ``[method]`` for FedTreeLoRA."""

    warmup_rounds: int | None = Field(
        None,
        ge=0,
        description="Rounds of purely local training before the tree is built, part of run.rounds; "
        "0 only with K = 1. "
        "Not set: min(5, rounds // 3), at least 1 unless K = 1.",
        examples=[2],
    )
    tau: float = Field(
        0.1, description="Score of leaving a layer whole; a split must have a larger silhouette."
    )
    K: int = Field(
        3,
        ge=1,
        description="A layer may have up to K - 1 groups more than the layer above it; 1 never "
        "splits.",
    )
    distance: Distance = Field(
        "frobenius", description="Distance between two clients' B in a layer."
    )
    linkage: Literal["average", "complete", "single", "weighted"] = Field(
        "average", description="Linkage of the merge tree."
    )
    weights: Literal["uniform", "examples"] = Field(
        "uniform",
        description="Weight of a client in its group's mean: the same for all, or its training "
        "examples.",
    )
    external: bool = Field(
        True,
        description="Whether a client also runs the frozen mean of everyone outside its group, "
        "mixed in by λ.",
    )
    external_update: Literal["published", "previous"] = Field(
        "published",
        description="The external expert that a client deploys: the one renewed at the same time "
        "as its cluster expert, or the one that its cluster expert was trained against.",
    )
    external_damping: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the old external expert that the new one keeps; 0 as published.",
        examples=[0.5],
    )
    lambda_lr: float = Field(
        10.0, ge=0, description="Learning rate of λ's free scalar, as a multiple of train.lr."
    )
    rebuild_every: int = Field(
        0,
        ge=0,
        description="Build tree and cuts anew every so many rounds after the warm-up; 0: never.",
    )
    fixed_k: int | None = Field(
        None,
        ge=1,
        description="Ablation: so many groups in every layer instead of the search.",
        examples=[4],
    )
    tree: bool = Field(
        True, description="false is an ablation: every layer is clustered alone, nothing is nested."
    )


@dataclass(frozen=True, eq=False)
class Grown:
    """The merge tree of the clients (rows as SciPy's linkage), and where each layer cuts it."""

    merges: np.ndarray
    cuts: dict[int, LayerCut]


class GroupMeans:
    """One merge tree, cut deeper from layer to layer; in each, a client gets its group's mean."""

    needs: ClassVar[Needs] = Needs(
        equal_ranks=True,
        equal_scales=True,
        every_weight=True,
        options=("tau", "K", "distance", "linkage", "fixed_k"),
    )

    def __init__(self, options: TreeOptions, round: Round):
        self.options = options
        self.sites = layers_of(round.sites)
        self.distances: dict[int, Tensor] = {}  # of the layers seen to their end, float64 [N, N]
        self._waiting: list[Tensor] = []  # of the sites of the layer that is being seen

    def look(self, given: Arrived) -> None:
        self.see(given.site, [each.B for each in given.factors])

    def see(self, site: Site, clients: Sequence[Tensor]) -> None:
        """Compare the clients' B, all [out, rank], at one site; sites come layer by layer."""
        only = {site.name: site}
        apart = between([{site.name: B} for B in clients], only, self.options.distance)[0]
        self._waiting.append(apart)
        if len(self._waiting) == len(self.sites[site.layer]):
            self.distances[site.layer] = torch.stack(self._waiting).mean(0)
            self._waiting = []

    @cached_property
    def grown(self) -> Grown:
        """The tree of all clients seen, and its cuts."""
        options = self.options
        distances = torch.stack(list(self.distances.values())).numpy()
        merges = merge_tree(distances.mean(0), options.linkage)
        if options.tree:
            cuts = layer_cuts(merges, list(distances), options.tau, options.K, options.fixed_k)
        else:
            cuts = untied_cuts(list(distances), options.tau, options.linkage)
        return Grown(merges, dict(zip(self.distances, cuts, strict=True)))

    def site(self, given: Arrived) -> Outcome:
        labels = self.grown.cuts[given.site.layer].labels.tolist()
        means = group_means(given.adapters, labels, given.weights)
        own = [means.own[label][given.name] for label in labels]
        return Outcome(whole=means.everyone[given.name], own=own)

    def notes(self) -> list[str]:
        counts = ", ".join(str(cut.count) for cut in self.grown.cuts.values())
        return [f"Groups from the first layer to the last: {counts}."]

    def artefacts(self, clients: Sequence[str]) -> dict[str, Any]:
        layers = []
        for layer, cut in self.grown.cuts.items():
            groups: list[list[str]] = [[] for _ in range(cut.count)]
            for name, label in zip(clients, cut.labels.tolist(), strict=True):
                groups[label].append(name)
            layers.append(
                {"layer": layer, "count": cut.count, "score": cut.score, "groups": groups}
            )
        merges = self.grown.merges.tolist()
        return {"tree.json": {"clients": list(clients), "layers": layers, "merges": merges}}


class FedTreeLoRA(Method):
    name = "fedtreelora"
    title = "FedTreeLoRA"
    laid_out = ("warmup",)
    pictures = "fedgrove.report.pictures.tree:tree"
    paper = "arXiv 2603.13282"
    trains = "A, B, λ"
    shares = "A, B"
    keeps = "λ"
    Options: ClassVar[type[contract.Options]] = TreeOptions
    Rule: ClassVar[type[ServerRule]] = GroupMeans

    def __init__(self, options: Any, setting: Setting):
        super().__init__(options, setting)
        self.layers = layers_of(setting.sites)
        self.warmup = _warmup(options, setting.rounds)

    # ------------------------------------------------------------------ server
    def needs_each(self) -> str:
        return "its tree is built from each client's own B"

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        """The server's memory.

        ``latest``: each member's newest adapter, ``first``: its B after its own warm-up,
        ``groups``: its group in each layer, ``experts``: in each layer, the mean of each group and
        of everyone else, ``trained_against``: in each layer, what each group's clients had for
        everyone else while they trained (with ``external_update = "previous"``), ``common``: the
        mean of all.
        """
        return {
            "tree": None,
            "latest": {},
            "first": {},
            "examples": {},
            "groups": {},
            "experts": {},
            "trained_against": {},
            "common": self.setting.shared_draw(),
        }

    def select(
        self, state: State, round: int, available: Sequence[str], fraction: float
    ) -> list[str]:
        """Everyone in the warm-up, then the usual draw."""
        return (
            list(available)
            if round <= self.warmup
            else super().select(state, round, available, fraction)
        )

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        """A member's experts. A client that has to warm up is sent no tensor: the shared draw costs
        no message.
        """
        if client.name in state["groups"]:
            if round > self.setting.rounds:
                return self.deploy(state, self.setting.rounds, client)
            return self._experts(state, state["groups"][client.name])
        if self.warmup and round <= self.setting.rounds:
            return {"join": True} if state["tree"] else {}
        return self.welcome(state, client, None)

    def deploy(self, state: State, round: int, client: ClientInfo) -> Offer:
        """A member's experts, the external one as ``external_update`` says."""
        if client.name not in state["groups"]:
            return self.offer(state, round + 1, client)
        return self._experts(state, state["groups"][client.name], state["trained_against"])

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = {
            update.client: update.content["adapter"]
            for update in updates
            if "adapter" in update.content
        }
        probes = {update.client: update.content["B"] for update in updates if "B" in update.content}
        if not adapters and not probes:
            return state
        examples = {update.client: update.examples for update in updates}
        state = {
            **state,
            "latest": _by_name(state["latest"], adapters),
            "first": _by_name(
                {name: _bs(adapter) for name, adapter in adapters.items()}, probes, state["first"]
            ),
            "examples": _by_name(state["examples"], examples),
        }
        if state["tree"] is None or self._rebuilds(round):
            state |= self._grown(state["latest"]) | {"experts": {}}
        late = {
            n: self._placed(state, bs)
            for n, bs in state["first"].items()
            if n not in state["groups"]
        }
        state["groups"] = _by_name(state["groups"], late)
        return state | self._renewed(state)

    def welcome(self, state: State, client: ClientInfo, probe: Mapping[str, Any] | None) -> Offer:
        """The mean of all; after the probe, the experts of the groups on the newcomer's way down
        the tree.
        """
        if probe is not None and state["tree"] is not None:
            groups, deepest = self._placed(state, probe["B"]), state["tree"]["layers"][-1]
            where = f"branch {groups[-1] + 1} of {deepest['count']} in layer {deepest['layer']}, the deepest"
            return {**self._experts(state, groups), "placed": where}
        return {"cluster": state["common"]}

    def global_assembly(self, state: State) -> Assembly | None:
        """The mean of all, where no layer is split."""
        if state["tree"] is None or any(layer["count"] > 1 for layer in state["tree"]["layers"]):
            return None
        return Assembly((Term("cluster", state["common"]),))

    def artefacts(self, state: State) -> dict[str, Any]:
        """``tree.json``. ``joined``: members that came after the tree was built, so that no merge
        names them.

        ``lambda`` holds what everyone may know, the 1 of layers that are not split; the rest is the
        clients' own.
        """
        tree = state["tree"]
        if tree is None:
            return {}
        layers = []
        for place, layer in enumerate(tree["layers"]):
            groups: list[list[str]] = [[] for _ in range(layer["count"])]
            for name, labels in state["groups"].items():
                groups[labels[place]].append(name)
            layers.append(
                {**{key: layer[key] for key in ("layer", "count", "score")}, "groups": groups}
            )
        whole = {str(layer["layer"]): layer["count"] == 1 for layer in layers}
        content = {
            "merges": tree["merges"],
            "clients": tree["clients"],
            "joined": [name for name in state["groups"] if name not in tree["clients"]],
            "layers": layers,
            "lambda": {
                key: dict.fromkeys(state["groups"], 1.0) if one else {}
                for key, one in whole.items()
            },
        }
        return {"tree.json": content}

    def _rebuilds(self, round: int) -> bool:
        every = self.options.rebuild_every
        return every > 0 and round > self.warmup and (round - self.warmup) % every == 0

    def _grown(self, latest: Mapping[str, Adapter]) -> State:
        """The tree and its cuts from the adapters as uploaded, and the groups of their clients."""
        rule = GroupMeans(self.options, Round(self.setting.sites))
        for names in self.layers.values():
            for name in names:
                site = self.setting.sites[name]
                rule.see(site, [adapter[name].B for adapter in latest.values()])
        merges, cuts = rule.grown.merges, list(rule.grown.cuts.values())
        labels = [cut.labels.tolist() for cut in cuts]
        layers = [
            {"layer": layer, "count": cut.count, "score": cut.score, "labels": own}
            for layer, cut, own in zip(self.layers, cuts, labels, strict=True)
        ]
        return {
            "tree": {"clients": list(latest), "merges": merges.tolist(), "layers": layers},
            "groups": {name: [own[row] for own in labels] for row, name in enumerate(latest)},
        }

    def _placed(self, state: State, bs: Mapping[str, Tensor]) -> list[int]:
        """The group of a newcomer in each layer, from its B after the warm-up."""
        tree = state["tree"]
        others = [state["first"][name] for name in tree["clients"]]
        distances = towards(bs, others, self.setting.sites, self.options.distance).numpy()
        labels = [np.array(layer["labels"], dtype=np.int64) for layer in tree["layers"]]
        if not self.options.tree:
            return [nearest(own, row) for own, row in zip(labels, distances, strict=True)]
        cuts = [
            LayerCut(each["layer"], each["count"], each["score"], own)
            for each, own in zip(tree["layers"], labels, strict=True)
        ]
        merges = np.array(tree["merges"], dtype=np.float64).reshape(-1, 4)
        return descend(merges, cuts, distances.mean(0))

    def _renewed(self, state: State) -> State:
        """New experts, the external ones damped towards the last ones."""
        old = {layer: each["external"] for layer, each in state["experts"].items()}
        new = self._averaged(state)
        damping = self.options.external_damping
        if damping:
            for layer, externals in old.items():
                means = new["experts"][layer]["external"]
                new["experts"][layer]["external"] = [
                    mean(pair, [damping, 1 - damping])
                    for pair in zip(externals, means, strict=True)
                ]
        if self.options.external_update == "previous":
            new["trained_against"] = old
        return new

    def _averaged(self, state: State) -> State:
        """Experts of every group in every layer, and the mean of all."""
        names = list(state["latest"])
        uniform = self.options.weights == "uniform"
        weights = [1.0 if uniform else float(state["examples"][name]) for name in names]
        experts: dict[str, Any] = {}
        common: Adapter = {}
        for place, (layer, sites) in enumerate(self.layers.items()):
            adapters = [{site: state["latest"][name][site] for site in sites} for name in names]
            means = group_means(adapters, [state["groups"][name][place] for name in names], weights)
            experts[str(layer)] = {
                "cluster": means.own,
                "external": means.rest if self.options.external else [],
            }
            common |= means.everyone
        return {"experts": experts, "common": self._ordered(common)}

    def _experts(
        self, state: State, groups: Sequence[int], externals: Mapping[str, Any] | None = None
    ) -> Offer:
        """What a member of these groups, one per layer, is sent: an external expert only where a
        layer is split. ``externals`` by layer stand in for the newest ones.
        """
        cluster: Adapter = {}
        external: Adapter = {}
        for group, (layer, experts) in zip(groups, state["experts"].items(), strict=True):
            cluster |= experts["cluster"][group]
            rest = (externals or {}).get(layer, experts["external"])
            if rest:
                external |= rest[group]
        offer = {"cluster": self._ordered(cluster)}
        return offer | {"external": self._ordered(external)} if external else offer

    def _ordered(self, adapter: Adapter) -> Adapter:
        """The sites in the base model's order: the optimiser walks them in it."""
        return {site: adapter[site] for site in self.setting.sites if site in adapter}

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Plan:
        if "cluster" in offer:
            return [Step(self.personal(client, offer, mine))]
        # A late client makes up for the rounds that it missed, so that its B has the same history
        # as the others'.
        missed = 1 if round <= self.warmup else max(1, self.warmup - mine.get("warmed", 0))
        return self._alone(missed, mine)

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        last = trained[-1]
        if "cluster" in offer:
            logits = {
                str(layer): last.extra(_key(layer))
                for layer in self.layers
                if _key(layer) in last.assembly.extras
            }
            return {"adapter": last.adapter("cluster")}, {"lambda": keep(logits)}
        own = last.adapter("own")
        sent = (
            {"B": _bs(own)} if "join" in offer else {"adapter": own} if round >= self.warmup else {}
        )
        return sent, {"own": own, "warmed": mine.get("warmed", 0) + len(trained)}

    def probe(self, client: ClientInfo, offer: Offer) -> Plan | None:
        return self._alone(self.warmup, {}) if self.warmup else None

    def probe_report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer
    ) -> dict[str, Any]:
        return {"B": _bs(trained[-1].adapter("own"))}

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        if "cluster" not in offer:
            return self._own(mine)
        terms = [Term("cluster", offer["cluster"])]
        if "external" not in offer:
            return Assembly(tuple(terms))
        terms.append(Term("external", offer["external"], train=""))
        known = reveal(mine.get("lambda", {}))
        split = sorted({self.setting.sites[site].layer for site in offer["external"]})
        extras = {
            _key(layer): Extra(known.get(str(layer), torch.zeros(())), lr=self.options.lambda_lr)
            for layer in split
        }
        return Assembly(tuple(terms), Convex("cluster", "external"), extras)

    def client_artefacts(self, client: ClientInfo, offer: Offer, mine: Mine) -> dict[str, Any]:
        logits = reveal(mine.get("lambda", {}))
        shares = {
            layer: {client.name: torch.sigmoid(logit.double()).item()}
            for layer, logit in logits.items()
        }
        return {"tree.json": {"lambda": shares}} if shares else {}

    def _own(self, mine: Mine) -> Assembly:
        own = mine["own"] if "own" in mine else self.setting.shared_draw()
        return Assembly((Term("own", own),))

    def _alone(self, rounds: int, mine: Mine) -> list[Step]:
        """So many rounds of local training in a row, each on its own order of the data."""
        own = self._own(mine)
        later = [f"train {number}" for number in range(2, rounds + 1)]
        return [Step(own), *(Step(own, carries=("own",), stream=stream) for stream in later)]


def _warmup(options: TreeOptions, rounds: int) -> int:
    """The rounds of warm-up. Raises JobError where they leave no tree to build, or options exclude
    each other.
    """
    if options.fixed_k is not None and not options.tree:
        raise JobError(
            f"method.fixed_k = {options.fixed_k} cuts the tree, and method.tree = false has none; "
            f"leave one out."
        )
    splits = not options.tree or (options.K > 1 if options.fixed_k is None else options.fixed_k > 1)
    if options.warmup_rounds is None:
        return max(int(splits), min(5, rounds // 3))
    if options.warmup_rounds == 0 and splits:
        raise JobError(
            "method.warmup_rounds = 0 leaves nothing to build the tree from; set it to 1 or more, "
            "or method.K = 1, "
            "which never splits."
        )
    if options.warmup_rounds > rounds:
        raise JobError(
            f"method.warmup_rounds = {options.warmup_rounds} is more than run.rounds = {rounds}, "
            f"of which they are a "
            f"part; set it to {rounds} or less."
        )
    return options.warmup_rounds


def _bs(adapter: Adapter) -> dict[str, Tensor]:
    return {site: factors.B for site, factors in adapter.items()}


def _by_name(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One dictionary in name order, a later part winning."""
    return dict(sorted({name: value for part in parts for name, value in part.items()}.items()))


def _key(layer: int) -> str:
    return f"{Convex.prefix}.{layer}"
