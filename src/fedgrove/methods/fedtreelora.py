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
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Site
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.assembly import Assembly, Convex, Extra, Term
from fedgrove.adapters.distance import Distance, between, layers_of, roughly, towards
from fedgrove.adapters.groups import group_means
from fedgrove.clustering.landmarks import joined, landmarks
from fedgrove.clustering.tree import (
    LayerCut,
    descend,
    layer_cuts,
    leaves,
    merge_tree,
    nearest,
    untied_cuts,
)
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
    keep,
    reveal,
)
from fedgrove.methods.rule import Arrived, Needs, Outcome, Round, ServerRule

Value = TypeVar("Value")
ALL = -1  # the layer that stands for the sum of all


class TreeOptions(contract.Options):
    """The keys of ``[method]`` for FedTreeLoRA."""

    warmup_rounds: int | None = Field(
        None,
        ge=0,
        description="Rounds of purely local training before the tree is built, part of run.rounds; "
        "0 only with K = 1. Not set: min(5, rounds // 3), at least 1 unless K = 1.",
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
    """The merge tree of the landmarks (rows as SciPy's linkage; up to ``landmarks.EXACT`` clients,
    all are), where each layer cuts it, and by layer the group of every client [N].
    """

    landmarks: list[int]
    merges: np.ndarray
    cuts: dict[int, LayerCut]
    labels: dict[int, list[int]]


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
        self.landmarks: list[int] = []
        self.distances: dict[int, Tensor] = {}  # of the layers seen to their end, float64 [M, M]
        #: where not all are landmarks, from everyone to them, [N, M]: of each layer, or, where one
        #: tree serves all, of layer -1 the sum
        self.rough: dict[int, Tensor] = {}
        self._waiting: list[Tensor] = []  # of the sites of the layer that is being seen

    def look(self, given: Arrived) -> None:
        self.see(given.site, [each.B for each in given.factors])

    def see(self, site: Site, clients: Sequence[Tensor]) -> None:
        """Compare the clients' B, all [out, rank], at one site; sites come layer by layer."""
        name, layer = site.name, site.layer
        self.landmarks = landmarks(len(clients)).tolist()
        held = [{name: clients[n]} for n in self.landmarks]
        apart = between(held, {name: site}, self.options.distance)
        self._waiting.append(apart[0])
        if len(held) < len(clients):
            rough = roughly(clients, self.landmarks, self.options.distance, name)
            key = ALL if self.options.tree else layer
            share = rough / len(self.sites[layer])
            self.rough[key] = self.rough[key].add_(share) if key in self.rough else share
        if len(self._waiting) == len(self.sites[layer]):
            together = torch.stack(self._waiting)
            self.distances[layer] = together.mean(0)
            self._waiting = []

    @cached_property
    def grown(self) -> Grown:
        """The tree of all clients seen, and its cuts."""
        options = self.options
        distances = torch.stack(list(self.distances.values())).numpy()
        merges = merge_tree(distances.mean(0), options.linkage)
        if options.tree:
            cuts = layer_cuts(
                merges,
                list(distances),
                options.tau,
                options.K,
                options.fixed_k,
            )
        else:
            cuts = untied_cuts(list(distances), options.tau, options.linkage)
        by_layer = dict(zip(self.distances, cuts, strict=True))
        labels = {layer: cut.labels.tolist() for layer, cut in by_layer.items()}
        if self.rough:
            labels = {layer: own.tolist() for layer, own in self._joined(merges, by_layer).items()}
        return Grown(self.landmarks, merges, by_layer, labels)

    def _joined(self, merges: np.ndarray, cuts: Mapping[int, LayerCut]) -> dict[int, np.ndarray]:
        """By layer the groups of all clients [N], where only landmarks are in the tree."""
        found = {}
        if self.options.tree:
            to = leaves(merges, self.rough[ALL].numpy())
            found = {layer: cut.labels[to] for layer, cut in cuts.items()}
        else:
            for layer, cut in cuts.items():
                found[layer] = joined(cut.labels, self.rough[layer].numpy())
        for layer, own in found.items():
            own[self.landmarks] = cuts[layer].labels
        return found

    def site(self, given: Arrived) -> Outcome:
        name = given.name
        labels = self.grown.labels[given.site.layer]
        means = group_means(given.adapters, labels, given.weights)
        own = [means.own[label][name] for label in labels]
        return Outcome(whole=means.everyone[name], own=own)

    def notes(self) -> list[str]:
        counts = ", ".join(str(cut.count) for cut in self.grown.cuts.values())
        return [f"Groups from the first layer to the last: {counts}."]

    def artefacts(self, clients: Sequence[str]) -> Plain:
        layers = []
        for layer, cut in self.grown.cuts.items():
            groups: list[list[str]] = [[] for _ in range(cut.count)]
            for name, label in zip(clients, self.grown.labels[layer], strict=True):
                groups[label].append(name)
            row = {
                "layer": layer,
                "count": cut.count,
                "score": cut.score,
            }
            layers.append({**row, "groups": groups})
        merges = self.grown.merges.tolist()
        compared = [clients[n] for n in self.grown.landmarks]
        content: Plain = {"clients": compared, "layers": layers, "merges": merges}
        if len(compared) < len(clients):
            content["joined"] = sorted(set(clients) - set(compared))
        return {"tree.json": content}


@dataclass(frozen=True, eq=False)
class Layer:
    """Where one layer cuts the tree."""

    layer: int
    count: int  # of its groups
    score: float
    labels: list[int]  # each client's group, in the tree's order of clients


@dataclass(frozen=True, eq=False)
class Tree:
    """The merge tree, and its cuts from the shallowest layer to the deepest."""

    clients: list[str]
    merges: list[list[float]]  # rows as SciPy's linkage
    layers: list[Layer]


@dataclass(frozen=True, eq=False)
class Experts:
    """A layer's means, one for each group, of the layer's sites."""

    cluster: list[Adapter]  # of the group
    external: list[Adapter]  # of everyone else; empty where nothing is split


@dataclass(frozen=True, eq=False)
class TreeState:
    """The server's memory. Groups are numbers, one for each layer; experts stand by layer."""

    common: Adapter  # the mean of all
    tree: Tree | None = None
    latest: dict[str, Adapter] = field(default_factory=dict)  # each member's newest adapter
    #: client -> site -> its B [out, rank] after its own warm-up
    first: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    groups: dict[str, list[int]] = field(default_factory=dict)
    experts: dict[str, Experts] = field(default_factory=dict)
    #: what each group's clients had for everyone else while they trained, with
    #: ``external_update = "previous"``
    trained_against: dict[str, list[Adapter]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Paths:
    """A client's experts. Without any, it warms up: from the shared draw, which costs no message."""

    cluster: Adapter | None = None
    external: Adapter | None = None  # of the layers that are split
    join: bool = False  # the tree stands already: send B alone
    placed: str = ""  # where a newcomer came to, in words


@dataclass(frozen=True, eq=False)
class Kept:
    """What a client keeps: first its own adapter, then its λ."""

    own: Adapter | None = None
    warmed: int = 0  # rounds trained alone
    #: the free scalar [] of λ, by layer
    logits: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Upload:
    """A trained adapter, or a late client's B [out, rank] by site; neither during the warm-up."""

    adapter: Adapter | None = None
    B: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Probe:
    """A newcomer's B [out, rank] by site, after a warm-up of its own."""

    B: dict[str, Tensor]


class FedTreeLoRA(Method):
    name = "fedtreelora"
    title = "FedTreeLoRA"
    laid_out = ("warmup",)
    pictures = "fedgrove.report.pictures.tree:tree"
    paper = "arXiv 2603.13282"
    trains = "A, B, λ"
    shares = "A, B"
    keeps = "λ"
    centres = "values"
    State, Offer, Mine, Sent, Probed = TreeState, Paths, Kept, Upload, Probe
    Options: ClassVar[type[contract.Options]] = TreeOptions
    Rule: ClassVar[type[ServerRule]] = GroupMeans

    def __init__(self, options: TreeOptions, setting: Setting):
        super().__init__(options, setting)
        self.layers = layers_of(setting.sites)
        self.warmup = _warmup(options, setting.rounds)

    @property
    def complete_from(self) -> int:
        return self.warmup + 1

    # ------------------------------------------------------------------ server
    def needs_each(self) -> str:
        return "its tree is built from each client's own B"

    def begin(self, clients: Sequence[ClientInfo]) -> TreeState:
        return TreeState(self.setting.shared_draw())

    def select(
        self,
        state: TreeState,
        round: int,
        available: Sequence[str],
        fraction: float,
    ) -> list[str]:
        """Everyone in the warm-up, then the usual draw."""
        if round <= self.warmup:
            return list(available)
        return super().select(state, round, available, fraction)

    def offer(
        self,
        state: TreeState,
        round: int,
        client: ClientInfo,
    ) -> Paths:
        """A member's experts. A client that has to warm up is sent no tensor: the shared draw costs
        no message.
        """
        if client.name in state.groups:
            if round > self.setting.rounds:
                return self.deploy(state, self.setting.rounds, client)
            return self._experts(state, state.groups[client.name])
        if self.warmup and round <= self.setting.rounds:
            return Paths(join=state.tree is not None)
        return self.welcome(state, client, None)

    def deploy(
        self,
        state: TreeState,
        round: int,
        client: ClientInfo,
    ) -> Paths:
        """A member's experts, the external one as ``external_update`` says."""
        if client.name not in state.groups:
            return self.offer(state, round + 1, client)
        return self._experts(
            state,
            state.groups[client.name],
            state.trained_against,
        )

    def aggregate(
        self,
        state: TreeState,
        round: int,
        updates: Sequence[Update[Upload]],
    ) -> TreeState:
        adapters: dict[str, Adapter] = {}
        firsts: dict[str, dict[str, Tensor]] = {}
        for update in updates:
            name, content = update.client, update.content
            if content.adapter is not None:
                adapters[name] = content.adapter
                firsts[name] = _bs(content.adapter)
            if content.B is not None:
                firsts[name] = content.B
        if not firsts:
            return state
        examples = {update.client: update.examples for update in updates}
        state = replace(
            state,
            latest=_by_name(state.latest, adapters),
            first=_by_name(firsts, state.first),
            examples=_by_name(state.examples, examples),
        )
        if state.tree is None or self._rebuilds(round):
            state = self._grown(state)
        late = {}
        for name, bs in state.first.items():
            if name not in state.groups:
                late[name] = self._placed(state, bs)
        return self._renewed(replace(state, groups=_by_name(state.groups, late)))

    def welcome(
        self,
        state: TreeState,
        client: ClientInfo,
        probe: Probe | None,
    ) -> Paths:
        """The mean of all; after the probe, the experts of the groups on the newcomer's way down
        the tree.
        """
        if probe is None or state.tree is None:
            return Paths(state.common)
        groups, deepest = self._placed(state, probe.B), state.tree.layers[-1]
        where = f"branch {groups[-1] + 1} of {deepest.count} in layer {deepest.layer}, the deepest"
        return replace(self._experts(state, groups), placed=where)

    def global_assembly(self, state: TreeState) -> Assembly | None:
        """The mean of all, where no layer is split."""
        if state.tree is None or any(layer.count > 1 for layer in state.tree.layers):
            return None
        return Assembly((Term("cluster", state.common),))

    def artefacts(self, state: TreeState) -> Plain:
        """``tree.json``. ``joined``: members that no merge names, because they came after the tree
        was built, or were placed in that of the landmarks.

        ``lambda`` holds what everyone may know, the 1 of layers that are not split; the rest is the
        clients' own.
        """
        tree = state.tree
        if tree is None:
            return {}
        layers = []
        known: dict[str, dict[str, float]] = {}
        for place, layer in enumerate(tree.layers):
            groups: list[list[str]] = [[] for _ in range(layer.count)]
            for name, labels in state.groups.items():
                groups[labels[place]].append(name)
            row = {
                "layer": layer.layer,
                "count": layer.count,
                "score": layer.score,
            }
            layers.append({**row, "groups": groups})
            known[str(layer.layer)] = {}
            if layer.count == 1:
                known[str(layer.layer)] = dict.fromkeys(state.groups, 1.0)
        content = {
            "merges": tree.merges,
            "clients": tree.clients,
            "joined": [name for name in state.groups if name not in tree.clients],
            "layers": layers,
            "lambda": known,
        }
        return {"tree.json": content}

    def _rebuilds(self, round: int) -> bool:
        every = self.options.rebuild_every
        return every > 0 and round > self.warmup and (round - self.warmup) % every == 0

    def _grown(self, state: TreeState) -> TreeState:
        """The tree and its cuts from the adapters as uploaded, and the groups of their clients."""
        rule = GroupMeans(self.options, Round(self.setting.sites))
        for names in self.layers.values():
            for name in names:
                site = self.setting.sites[name]
                rule.see(site, [adapter[name].B for adapter in state.latest.values()])
        layers = []
        for layer, cut in zip(self.layers, rule.grown.cuts.values(), strict=True):
            layers.append(Layer(layer, cut.count, cut.score, cut.labels.tolist()))
        groups = {}
        names = list(state.latest)
        for row, name in enumerate(names):
            groups[name] = [labels[row] for labels in rule.grown.labels.values()]
        tree = Tree(
            [names[row] for row in rule.grown.landmarks],
            rule.grown.merges.tolist(),
            layers,
        )
        return replace(state, tree=tree, groups=groups, experts={})

    def _placed(
        self,
        state: TreeState,
        bs: Mapping[str, Tensor],
    ) -> list[int]:
        """The group of a newcomer in each layer, from its B [out, rank] by site after the
        warm-up.
        """
        tree = state.tree
        assert tree is not None
        others = [state.first[name] for name in tree.clients]
        distances = towards(bs, others, self.setting.sites, self.options.distance).numpy()
        labels = [np.array(layer.labels, dtype=np.int64) for layer in tree.layers]
        if not self.options.tree:
            return [nearest(own, row) for own, row in zip(labels, distances, strict=True)]
        cuts = []
        for layer, own in zip(tree.layers, labels, strict=True):
            cuts.append(LayerCut(layer.layer, layer.count, layer.score, own))
        merges = np.array(tree.merges, dtype=np.float64).reshape(-1, 4)
        return descend(merges, cuts, distances.mean(0))

    def _renewed(self, state: TreeState) -> TreeState:
        """New experts, the external ones damped towards the last ones."""
        old = {layer: each.external for layer, each in state.experts.items()}
        state = self._averaged(state)
        damping = self.options.external_damping
        if damping:
            experts = dict(state.experts)
            for layer, before in old.items():
                pairs = zip(before, experts[layer].external, strict=True)
                damped = [mean(pair, [damping, 1 - damping]) for pair in pairs]
                experts[layer] = replace(experts[layer], external=damped)
            state = replace(state, experts=experts)
        if self.options.external_update == "previous":
            return replace(state, trained_against=old)
        return state

    def _averaged(self, state: TreeState) -> TreeState:
        """Experts of every group in every layer, and the mean of all."""
        names = list(state.latest)
        weights = [1.0] * len(names)
        if self.options.weights == "examples":
            weights = [float(state.examples[name]) for name in names]
        experts: dict[str, Experts] = {}
        common: Adapter = {}
        for place, (layer, sites) in enumerate(self.layers.items()):
            adapters: list[Adapter] = []
            for name in names:
                latest = state.latest[name]
                adapters.append({site: latest[site] for site in sites})
            labels = [state.groups[name][place] for name in names]
            means = group_means(adapters, labels, weights)
            external: list[Adapter] = []
            if self.options.external:
                external = list(means.rest)
            experts[str(layer)] = Experts(list(means.own), external)
            common |= means.everyone
        return replace(state, experts=experts, common=self._ordered(common))

    def _experts(
        self,
        state: TreeState,
        groups: Sequence[int],
        externals: Mapping[str, Sequence[Adapter]] | None = None,
    ) -> Paths:
        """What a member of these groups, one per layer, is sent: an external expert only where a
        layer is split. ``externals`` by layer stand in for the newest ones.
        """
        cluster: Adapter = {}
        external: Adapter = {}
        for group, (layer, experts) in zip(groups, state.experts.items(), strict=True):
            cluster |= experts.cluster[group]
            rest = (externals or {}).get(layer, experts.external)
            if rest:
                external |= rest[group]
        return Paths(self._ordered(cluster), self._ordered(external) or None)

    def _ordered(self, adapter: Adapter) -> Adapter:
        """The sites in the base model's order: the optimiser walks them in it."""
        return {site: adapter[site] for site in self.setting.sites if site in adapter}

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Paths,
        mine: Kept,
        round: int,
    ) -> Plan:
        if offer.cluster is not None:
            return [Step(self.personal(client, offer, mine))]
        if round <= self.warmup:
            return self._alone(1, mine)
        # A late client makes up for the rounds that it missed, so that its B has the same history
        # as the others'.
        return self._alone(max(1, self.warmup - mine.warmed), mine)

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Paths,
        mine: Kept,
        round: int,
    ) -> tuple[Upload, Kept]:
        last = trained[-1]
        if offer.cluster is not None:
            logits = {}
            for layer in self.layers:
                if _key(layer) in last.assembly.extras:
                    logits[str(layer)] = last.extra(_key(layer))
            return Upload(last.adapter("cluster")), Kept(logits=keep(logits))
        own = last.adapter("own")
        kept = Kept(own, mine.warmed + len(trained))
        if offer.join:
            return Upload(B=_bs(own)), kept
        if round >= self.warmup:
            return Upload(own), kept
        return Upload(), kept

    def probe(self, client: ClientInfo, offer: Paths) -> Plan | None:
        if not self.warmup:
            return None
        return self._alone(self.warmup, Kept())

    def probe_report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Paths,
    ) -> Probe:
        return Probe(_bs(trained[-1].adapter("own")))

    def personal(
        self,
        client: ClientInfo,
        offer: Paths,
        mine: Kept,
    ) -> Assembly:
        if offer.cluster is None:
            return self._own(mine)
        cluster = Term("cluster", offer.cluster)
        if offer.external is None:
            return Assembly((cluster,))
        known = reveal(mine.logits)
        extras = {}
        for layer in sorted({self.setting.sites[site].layer for site in offer.external}):
            logit = known.get(str(layer), torch.zeros(()))
            extras[_key(layer)] = Extra(logit, lr=self.options.lambda_lr)
        terms = (cluster, Term("external", offer.external, train=""))
        return Assembly(terms, Convex("cluster", "external"), extras)

    def client_artefacts(
        self,
        client: ClientInfo,
        offer: Paths,
        mine: Kept,
    ) -> Plain:
        """For ``tree.json``: the client's λ in the layers that are split."""
        shares = {}
        for layer, logit in reveal(mine.logits).items():
            shares[layer] = {client.name: torch.sigmoid(logit.double()).item()}
        if not shares:
            return {}
        return {"tree.json": {"lambda": shares}}

    def _own(self, mine: Kept) -> Assembly:
        own = mine.own
        if own is None:
            own = self.setting.shared_draw()
        return Assembly((Term("own", own),))

    def _alone(self, rounds: int, mine: Kept) -> list[Step]:
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
            "leave one out."
        )
    most = options.K if options.fixed_k is None else options.fixed_k
    splits = not options.tree or most > 1
    if options.warmup_rounds is None:
        return max(int(splits), min(5, rounds // 3))
    if options.warmup_rounds == 0 and splits:
        raise JobError(
            "method.warmup_rounds = 0 leaves nothing to build the tree from; set it to 1 or more, "
            "or method.K = 1, which never splits."
        )
    if options.warmup_rounds > rounds:
        raise JobError(
            f"method.warmup_rounds = {options.warmup_rounds} is more than run.rounds = {rounds}, "
            f"of which they are a part; set it to {rounds} or less."
        )
    return options.warmup_rounds


def _bs(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's B [out, rank] by site."""
    return {site: factors.B for site, factors in adapter.items()}


def _by_name(
    one: Mapping[str, Value],
    other: Mapping[str, Value],
) -> dict[str, Value]:
    """One dictionary in name order, the other winning."""
    return dict(sorted({**one, **other}.items()))


def _key(layer: int) -> str:
    return f"{Convex.prefix}.{layer}"
