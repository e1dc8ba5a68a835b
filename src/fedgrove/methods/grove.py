"""grove: who shares (groups), how deep (layer by layer) and how much (rank-1 modules), as one method.

Source: ours. It composes HiLoRA's tiers (arXiv 2603.02785), FedTreeLoRA's nested cuts by layer
(arXiv 2603.13282) and Fed-PLoRA's rank-1 modules with select-N-fold (arXiv 2602.16936). At a site
of layer l client i runs

    W0 + s Σ_{j < R_root} B_j A_j + s Σ_{R_root <= j < R} B_(g,j) A_(g,j),    g = group of i in l

with one scale ``s = alpha / R``: the first modules of its path are everybody's, the others those of
its group in that layer, and the groups of a deeper layer only split those of the layer above.

1. Root: everybody trains the root's modules. From what training changed in B (never from B as it
   stands), summed over odd and over even rounds apart, the groups grow (``clustering.growth``).
2. Branches: each group's modules start from ``B = 0`` and the one shared draw, so no client's
   function changes when they appear. Root and branches train together, or in cascade.
3. Leaf, where there is one: in the last rounds a client trains private modules on its frozen path,
   sends nothing, and chooses on held-out rows how much of branch and leaf it keeps (``_leaf``).

A client of budget r_i draws r_i modules of its path each round, trains them from their values as
one dense LoRA, folds the rest, and sends what it trained, tagged by index. The server takes the
uniform mean of each index over those of the node that trained it; what nobody trained stays.
A client that the growth never saw, late or new, descends the tree by what a first training changed.

With one node and full budgets it is FedIT with uniform weights, with mixed budgets Fed-PLoRA, both
bit for bit. In cascade and with the same groups in all layers it is HiLoRA's root and cluster with
means of factors; without root modules FedTreeLoRA's experts without the external one.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import index_mean, select
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.adapters.distance import Bs, between, layers_of
from fedgrove.adapters.subspace import basis, principal_angle_distances
from fedgrove.clustering.growth import grow
from fedgrove.clustering.matrix import Matrix
from fedgrove.clustering.tree import LayerCut, descend, layer_cuts, merge_tree
from fedgrove.ground.errors import JobError
from fedgrove.ground.plain import Plain
from fedgrove.methods import contract
from fedgrove.methods._leaf import BRANCH, LEAF, ROOT, SEEN, Gated, gate_steps, gates_of
from fedgrove.methods.contract import ClientInfo, Method, Plan, Setting, Step, Trained, Update
from fedgrove.methods.fed_plora import best, refuse_scales, training


class GroveOptions(contract.Options):
    """The keys of ``[method]`` for grove."""

    root_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the R modules that the root owns; the branches own the others. 1: one "
        "node for all, nothing grows.",
    )
    root_rounds: int | None = Field(
        None,
        ge=2,
        description="Rounds of the root before the groups grow, part of run.rounds. Not set: a fifth "
        "of them, at least 2.",
        examples=[2],
    )
    together: bool = Field(
        True,
        description="Whether root and branches train together; false freezes the root once it has "
        "branches, as a cascade.",
    )
    evidence: Literal["subspace", "change"] = Field(
        "subspace",
        description="Distance between two clients: principal angles of what training changed in "
        "their B, or one minus the cosine of those changes after their common part is taken out.",
    )
    level: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Level of the permutation test that a layer's split must pass.",
    )
    tau: float | None = Field(
        None,
        description="Instead of the test: FedTreeLoRA's score of leaving a layer whole.",
        examples=[0.1],
    )
    most: int = Field(
        3, ge=1, description="A layer may have up to most - 1 groups more than the one above it."
    )
    leaf_rounds: int = Field(
        0,
        ge=0,
        description="Last rounds, part of run.rounds, in which each client trains private modules "
        "on its frozen path and sends nothing; 0: no leaf.",
        examples=[2],
    )
    leaf_rank: int = Field(
        2, ge=1, description="Modules of a leaf, never more than the client's rank."
    )


@dataclass(frozen=True, eq=False)
class Evidence:
    """What training changed in a client's B, summed over its odd and its even trainings."""

    odd: dict[str, Tensor] = field(default_factory=dict)  # site -> [out, R]
    even: dict[str, Tensor] = field(default_factory=dict)
    trainings: int = 0


@dataclass(frozen=True, eq=False)
class Layer:
    """The groups of a layer: of the grown clients, in their order, and each group's modules."""

    layer: int
    count: int
    score: float
    labels: list[int]
    branches: list[Adapter]  # one for each group, of the layer's sites


@dataclass(frozen=True, eq=False)
class Tree:
    """What the growth found."""

    clients: list[str]  # the rows of labels and merges
    merges: list[list[float]]
    round: int
    layers: list[Layer]


@dataclass(frozen=True, eq=False)
class GroveState:
    """The server's memory."""

    root: Adapter
    tree: Tree | None = None
    groups: dict[str, list[int]] = field(default_factory=dict)  # client -> its group in each layer
    evidence: dict[str, Evidence] = field(default_factory=dict)
    trained: dict[str, list[int]] = field(default_factory=dict)  # client -> trainings of each index


@dataclass(frozen=True, eq=False)
class Path:
    """A client's modules from the root to its groups; ``first``: the first index that may train."""

    path: Adapter
    first: int = 0
    placed: str = ""
    branches: int = 0  # how many of the modules, the last ones, are a group's


@dataclass(frozen=True, eq=False)
class Modules:
    """The modules that a client trained, at their indices of the path."""

    modules: Adapter
    indices: list[int]


@dataclass(frozen=True, eq=False)
class Own:
    """What stays with a client: its leaf, and how much of branch and leaf it keeps by layer."""

    leaf: Adapter | None = None
    gates: dict[str, list[float]] = field(default_factory=dict)  # layer -> of branch, of leaf


@dataclass(frozen=True, eq=False)
class Changed:
    """What a newcomer's probe changed in B."""

    change: dict[str, Tensor]


class Grove(Method):
    name = "grove"
    title = "Grove"
    pictures = "fedgrove.report.pictures.grove:grove"
    laid_out = ("root_rounds", "leaves")
    paper = "ours"
    trains = "r_i modules of the path"
    shares = "those modules"
    keeps = "leaf"
    ranks = "mixed"
    averages_factors = True
    no_rule = (
        "its groups grow from what training changed over several rounds, and a directory holds "
        "where one round ended"
    )
    centres = "values"
    State, Offer, Mine, Sent, Probed = GroveState, Path, Own, Modules, Changed
    Options: ClassVar[type[contract.Options]] = GroveOptions

    def __init__(self, options: GroveOptions, setting: Setting):
        super().__init__(options, setting)
        self.layers = layers_of(setting.sites)
        share = options.root_share
        rank = round(setting.rank * share)
        if 0 < share < 1:  # both have at least one module, where there are two
            most = max(1, setting.rank - 1)
            rank = min(max(rank, 1), most)
        self.root_rank = rank
        self.root_rounds = _root_rounds(options, setting, rank)
        #: the first round of the leaves; 0: there is none
        self.leaves = 0
        if options.leaf_rounds:
            self.leaves = setting.rounds - options.leaf_rounds + 1

    @property
    def complete_from(self) -> int:
        if self.root_rounds == self.setting.rounds:
            return 1
        return self.root_rounds + 1

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        refuse_scales(clients, self.setting, "grove")

    def needs_each(self) -> str:
        if self.root_rounds == self.setting.rounds:
            return "only a client knows which modules it trained"
        return "its groups grow from what each client's own training changed"

    def reads(self) -> str:
        if self.leaves:
            return "the rows on which a client chooses how much of branch and leaf it keeps"
        return ""

    def begin(self, clients: Sequence[ClientInfo]) -> GroveState:
        return GroveState(_some(self.setting.shared_draw(), 0, self._nodes_rank))

    @property
    def _nodes_rank(self) -> int:
        """Modules of everybody's node before the growth: the root's, or all where it has none."""
        return self.root_rank or self.setting.rank

    def offer(
        self,
        state: GroveState,
        round: int,
        client: ClientInfo,
    ) -> Path:
        groups = state.groups.get(client.name)
        if state.tree is None or groups is None:
            return Path(state.root)
        return self._path(state, groups)

    def aggregate(
        self,
        state: GroveState,
        round: int,
        updates: Sequence[Update[Modules]],
    ) -> GroveState:
        if self._of_leaves(round):
            return state
        evidence, trained = dict(state.evidence), dict(state.trained)
        for update in updates:
            name, content = update.client, update.content
            if name not in state.groups:
                evidence[name] = self._seen(
                    evidence.get(name, Evidence()),
                    content,
                    state.root,
                )
            trained[name] = _counted(
                trained.get(name),
                content.indices,
                self.setting.rank,
            )
        after = replace(
            state,
            root=self._rooted(state, updates),
            evidence=evidence,
            trained=trained,
        )
        if state.tree is not None:
            after = replace(after, tree=self._branched(state, state.tree, updates))
            return self._joined(after, [u.client for u in updates])
        if round == self.root_rounds < self.setting.rounds:
            return self._grown(after, round)
        return after

    def welcome(
        self,
        state: GroveState,
        client: ClientInfo,
        probe: Changed | None,
    ) -> Path:
        if probe is None or state.tree is None:
            return Path(state.root)
        groups = self._placed(state, Evidence(probe.change, probe.change, 2))
        deepest = state.tree.layers[-1]
        where = f"branch {groups[-1] + 1} of {deepest.count} in layer {deepest.layer}, the deepest"
        return replace(self._path(state, groups), placed=where)

    def global_assembly(self, state: GroveState) -> Assembly | None:
        """The root, as long as it is what everyone runs."""
        if state.tree is not None or self.leaves:
            return None
        return Assembly((Term("path", state.root),))

    def artefacts(self, state: GroveState) -> Plain:
        """``grove.json``: the paths and who trained what of them."""
        if state.tree is None:
            return {}
        layers = []
        for place, layer in enumerate(state.tree.layers):
            groups: list[list[str]] = [[] for _ in range(layer.count)]
            for name, labels in sorted(state.groups.items()):
                groups[labels[place]].append(name)
            row = {
                "layer": layer.layer,
                "count": layer.count,
                "score": layer.score,
            }
            layers.append({**row, "groups": groups})
        return {
            "grove.json": {
                "clients": state.tree.clients,
                "joined": sorted(set(state.groups) - set(state.tree.clients)),
                "merges": state.tree.merges,
                "grown": state.tree.round,
                "modules": {"root": self.root_rank, "branch": self.setting.rank - self.root_rank},
                "layers": layers,
                "trained": dict(sorted(state.trained.items())),
            }
        }

    # ----------------------------------------------------------------- means of nodes
    def _rooted(
        self,
        state: GroveState,
        updates: Sequence[Update[Modules]],
    ) -> Adapter:
        """The root after a round: the mean of each of its indices over everybody."""
        if state.tree is not None and self.root_rank == 0:
            return state.root
        return _mean([_within(u.content, 0, self._nodes_rank) for u in updates], state.root)

    def _branched(
        self,
        state: GroveState,
        tree: Tree,
        updates: Sequence[Update[Modules]],
    ) -> Tree:
        """The branches after a round: the mean of each index over those of the group."""
        layers = []
        for place, layer in enumerate(tree.layers):
            branches = list(layer.branches)
            for group in range(layer.count):
                members = [u for u in updates if _in(state.groups.get(u.client), place, group)]
                if members:
                    branches[group] = self._group_mean(branches[group], members)
            layers.append(replace(layer, branches=branches))
        return replace(tree, layers=layers)

    def _group_mean(
        self,
        old: Adapter,
        members: Sequence[Update[Modules]],
    ) -> Adapter:
        """The mean over a group's members of the sites of one layer."""
        parts = [_within(u.content, self.root_rank, self.setting.rank) for u in members]
        own = [Modules({site: p.modules[site] for site in old}, p.indices) for p in parts]
        return _mean(own, old)

    # ------------------------------------------------------------------------ growth
    def _seen(
        self,
        past: Evidence,
        content: Modules,
        start: Adapter,
    ) -> Evidence:
        """The evidence with one more training: what it changed, in the odd or in the even sum."""
        change: dict[str, Tensor] = {}
        for site, factors in content.modules.items():
            B = torch.zeros_like(start[site].B)
            B[:, content.indices] = factors.B - start[site].B[:, content.indices]
            change[site] = B
        if past.trainings % 2 == 0:
            return replace(
                past,
                odd=_sum(past.odd, change),
                trainings=past.trainings + 1,
            )
        return replace(
            past,
            even=_sum(past.even, change),
            trainings=past.trainings + 1,
        )

    def _grown(self, state: GroveState, round: int) -> GroveState:
        """The tree and its groups, from the clients that trained at least once."""
        names = sorted(state.evidence)
        seen = [state.evidence[name] for name in names]
        first = self._apart([_half(each, odd=True) for each in seen])
        second = self._apart([_half(each, odd=False) for each in seen])
        whole = np.mean([*first, *second], axis=0)
        merges = merge_tree(whole)
        cuts = self._cuts(names, first, second, merges)
        layers: list[Layer] = []
        for layer, cut in zip(self.layers, cuts, strict=True):
            begun = self._layer(layer, cut, state.root)
            layers.append(begun)
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            groups[name] = [each.labels[row] for each in layers]
        tree = Tree(names, merges.tolist(), round, layers)
        return replace(state, tree=tree, groups=groups)

    def _cuts(
        self,
        names: Sequence[str],
        first: list[Matrix],
        second: list[Matrix],
        merges: Matrix,
    ) -> list[LayerCut]:
        """The groups of the clients ``names``, layer by layer, from their two measurements (each
        [N, N] a layer) and the tree [N - 1, 4] of both.
        """
        options = self.options
        if options.tau is not None:
            both = [(one + other) / 2 for one, other in zip(first, second, strict=True)]
            return layer_cuts(merges, both, options.tau, options.most)
        seed = self.setting.integer("grove", "growth")
        return grow(
            first,
            second,
            level=options.level,
            most=options.most,
            seed=seed,
        )

    def _layer(
        self,
        layer: int,
        cut: LayerCut,
        root: Adapter,
    ) -> Layer:
        """A layer's groups, their modules as yet without effect.

        Where the root owns no module, groups go on from what everybody's node holds.
        """
        if self.root_rank == 0:
            start = root
        else:
            start = _some(
                self.setting.shared_draw(),
                self.root_rank,
                self.setting.rank,
            )
        own = {site: start[site] for site in self.layers[layer]}
        return Layer(
            layer,
            cut.count,
            cut.score,
            cut.labels.tolist(),
            [own] * cut.count,
        )

    def _apart(self, clients: Sequence[Bs]) -> list[Matrix]:
        """Distances between the clients, for each layer [N, N]."""
        if self.options.evidence == "change":
            own = _without_common(clients)
            by_layer = between(own, self.setting.sites, "cosine")
            return list(by_layer.numpy())
        found: list[Matrix] = []
        for sites in self.layers.values():
            each: list[Tensor] = []
            for site in sites:
                spans = [_span(client[site]) for client in clients]
                each.append(principal_angle_distances(spans))
            mean = torch.stack(each).mean(0)
            found.append(mean.numpy())
        return found

    def _placed(self, state: GroveState, evidence: Evidence) -> list[int]:
        """The groups of a client that the growth did not see, down the tree."""
        assert state.tree is not None
        known = [_both(state.evidence[name]) for name in state.tree.clients]
        rows = self._apart([_both(evidence), *known])
        cuts: list[LayerCut] = []
        for each in state.tree.layers:
            labels = np.array(each.labels, dtype=np.int64)
            cuts.append(LayerCut(each.layer, each.count, each.score, labels))
        merges = np.array(state.tree.merges, dtype=np.float64).reshape(-1, 4)
        to_others = [row[0, 1:] for row in rows]
        return descend(merges, cuts, np.mean(to_others, axis=0))

    def _joined(self, state: GroveState, names: Sequence[str]) -> GroveState:
        """The groups with those that trained without any."""
        groups = dict(state.groups)
        for name in names:
            if name not in groups:
                groups[name] = self._placed(state, state.evidence[name])
        in_order = dict(sorted(groups.items()))
        return replace(state, groups=in_order)

    def _path(self, state: GroveState, groups: Sequence[int]) -> Path:
        """The modules from the root down to the groups, one group for each layer."""
        assert state.tree is not None
        path: Adapter = {}
        for group, layer in zip(groups, state.tree.layers, strict=True):
            for site, branch in layer.branches[group].items():
                path[site] = branch
                if self.root_rank:
                    path[site] = _joint(state.root[site], branch)
        ordered = {site: path[site] for site in self.setting.sites}
        branches = self.setting.rank - self.root_rank
        if self.options.together:
            return Path(ordered, branches=branches)
        return Path(ordered, first=self.root_rank, branches=branches)

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Path,
        mine: Own,
        round: int,
    ) -> Generator[Step, Trained, None]:
        if self._of_leaves(round):
            grown = yield Step(self._with_leaf(client, offer, mine), part=SEEN)
            if round == self.setting.rounds:
                yield from gate_steps(grown.assembly, list(self.layers))
            return
        yield Step(training(offer.path, self._choose(client, offer, round)))

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Path,
        mine: Own,
        round: int,
    ) -> tuple[Modules, Own]:
        if self._of_leaves(round):
            return Modules({}, []), self._leafed(trained, round)
        chosen = self._choose(client, offer, round)
        return Modules(trained[-1].adapter("selected"), chosen), mine

    def probe(self, client: ClientInfo, offer: Path) -> Plan | None:
        """One round's training of the whole root."""
        if self.root_rounds == self.setting.rounds:
            return None
        return [Step(Assembly((Term("path", offer.path),)))]

    def probe_report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Path,
    ) -> Changed:
        after = trained[-1].adapter("path")
        return Changed({site: after[site].B - f.B for site, f in offer.path.items()})

    def personal(
        self,
        client: ClientInfo,
        offer: Path,
        mine: Own,
    ) -> Assembly:
        if mine.leaf is None:
            return Assembly((Term("path", offer.path),))
        whole = self._with_leaf(client, offer, mine)
        gates = {int(layer): (pair[0], pair[1]) for layer, pair in mine.gates.items()}
        terms = tuple(replace(term, train="AB") for term in whole.terms)
        return replace(whole, terms=terms, mix=Gated(gates))

    def client_artefacts(
        self,
        client: ClientInfo,
        offer: Path,
        mine: Own,
    ) -> Plain:
        """For ``grove.json``: how much of branch and leaf the client keeps in each layer."""
        if not mine.gates or not offer.branches:
            return {}  # nothing grew, so there is no file
        return {"grove.json": {"gates": {client.name: mine.gates}}}

    def _of_leaves(self, round: int) -> bool:
        """Whether the round is one of the leaves', in which nothing is sent."""
        return 0 < self.leaves <= round

    def _leafed(self, trained: Sequence[Trained], round: int) -> Own:
        """What a client keeps after a round of its leaf; after the last one its gates too."""
        own = Own(trained[0].adapter(LEAF))
        if round < self.setting.rounds:
            return own
        gates = gates_of(trained, list(self.layers))
        return replace(own, gates={str(layer): list(gate) for layer, gate in gates.items()})

    def _with_leaf(
        self,
        client: ClientInfo,
        offer: Path,
        mine: Own,
    ) -> Assembly:
        """The frozen path and the leaf, which trains; a new one computes nothing."""
        rank = _rank(offer)
        root = rank - offer.branches
        terms = []
        if root:
            terms.append(Term(ROOT, _some(offer.path, 0, root), train=""))
        if offer.branches:
            terms.append(Term(BRANCH, _some(offer.path, root, rank), train=""))
        own = mine.leaf
        if own is None:
            modules = min(self.options.leaf_rank, client.rank)
            own = self.setting.shared_draw(modules, "leaf")
        return Assembly((*terms, Term(LEAF, own, home="client")))

    def _choose(
        self,
        client: ClientInfo,
        offer: Path,
        round: int,
    ) -> list[int]:
        """The indices that the client trains in this round: a uniform draw of its budget."""
        rng = self.setting.rng(round, client.name, "modules", "")  # Fed-PLoRA's draw
        score = torch.zeros(_rank(offer) - offer.first, dtype=torch.float64)
        return [offer.first + index for index in best(score, client.rank, rng)]


def _root_rounds(
    options: GroveOptions,
    setting: Setting,
    root_rank: int,
) -> int:
    """Rounds of the root alone; all of them where nothing can grow. JobError where they are too
    many.
    """
    shared, needed = setting.rounds - options.leaf_rounds, options.root_rounds or 1
    if options.leaf_rounds and shared < needed:
        raise JobError(
            f"method.leaf_rounds = {options.leaf_rounds} leaves {max(0, shared)} of run.rounds = "
            f"{setting.rounds} for root and branches, which need {needed}; set it to "
            f"{max(0, setting.rounds - needed)} or less."
        )
    if root_rank == setting.rank:
        return setting.rounds
    if options.root_rounds is None:
        return min(setting.rounds, max(2, round(setting.rounds / 5)))
    if options.root_rounds > setting.rounds:
        raise JobError(
            f"method.root_rounds = {options.root_rounds} is more than run.rounds = {setting.rounds}, "
            f"of which they are a part; set it to {setting.rounds} or less."
        )
    return options.root_rounds


def _rank(offer: Path) -> int:
    """Modules of a path."""
    return next(iter(offer.path.values())).rank


def _some(
    adapter: Adapter,
    first: int,
    last: int,
) -> Adapter:
    """The modules first .. last - 1."""
    return select(adapter, list(range(first, last)))


def _joint(root: Factors, branch: Factors) -> Factors:
    """Two nodes' modules of one site as one: A [R, in], B [out, R]."""
    return Factors(
        torch.cat([root.A, branch.A]),
        torch.cat([root.B, branch.B], 1),
        root.scale,
    )


def _within(
    content: Modules,
    first: int,
    last: int,
) -> Modules:
    """Of what a client trained the indices first .. last - 1, counted from ``first``."""
    rows = [row for row, index in enumerate(content.indices) if first <= index < last]
    indices = [content.indices[row] - first for row in rows]
    return Modules(select(content.modules, rows), indices)


def _mean(parts: Sequence[Modules], old: Adapter) -> Adapter:
    """The uniform mean of each index over those that trained it; ``old`` where nobody did."""
    held = [part for part in parts if part.indices]
    if not held:
        return old
    return index_mean(
        [part.modules for part in held],
        [part.indices for part in held],
        old,
    )


def _in(
    groups: Sequence[int] | None,
    place: int,
    group: int,
) -> bool:
    return groups is not None and groups[place] == group


def _counted(
    past: Sequence[int] | None,
    indices: Sequence[int],
    rank: int,
) -> list[int]:
    """How often each index was trained, one training more."""
    counts = list(past or [0] * rank)
    for index in indices:
        counts[index] += 1
    return counts


def _without_common(clients: Sequence[Bs]) -> list[dict[str, Tensor]]:
    """The clients' changes of B, [out, R] by site, without the part that all have in common."""
    common: dict[str, Tensor] = {}
    for site in clients[0]:
        every = torch.stack([each[site] for each in clients])
        common[site] = every.mean(0)
    own: list[dict[str, Tensor]] = []
    for each in clients:
        rest = {site: B - common[site] for site, B in each.items()}
        own.append(rest)
    return own


def _sum(
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Changes of B, [out, R] by site, added up; ``one`` may have none yet."""
    if not one:
        return dict(other)
    return {site: B + other[site] for site, B in one.items()}


def _half(evidence: Evidence, odd: bool) -> Bs:
    """One of the two measurements; of a client that trained once, the only one."""
    if odd or not evidence.even:
        return evidence.odd
    return evidence.even


def _both(evidence: Evidence) -> Bs:
    if evidence.even:
        return _sum(evidence.odd, evidence.even)
    return evidence.odd


def _span(change: Tensor) -> Tensor:
    """An orthonormal basis [out, r] of a change of B [out, R], of the r modules that trained."""
    moved = change[:, change.any(0)]
    if moved.shape[1] == 0:
        return basis(change, 1)
    return basis(moved.double())
