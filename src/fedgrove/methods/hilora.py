"""HiLoRA: a cascade of three frozen tiers, root (everyone), cluster (those alike) and leaf (the
client alone).

Source: "HiLoRA", arXiv 2603.02785 (CVPR 2026); not arXiv 2510.12266, which bears the same name. A
client runs
``W0 + B_r A_r + B_c A_c + B_l A_l``; one tier trains at a time, those above it are frozen. The
server averages products (``ΔW = Σ p_i s_i B_i A_i``) and factorises them again by a truncated SVD,
``B := U``, ``A := ΣVᵀ / s``; at the end of the root tier it groups the clients once, by the
subspaces that their ``B`` span.

Where this differs, or the paper leaves it open: the tiers share ``run.rounds`` by ``fractions``,
and what an early stop saves goes to the tiers below; the moving average of the bases starts from
zero; clients of smaller rank run the best part of each tier that their rank allows; a client that
missed the root tier is placed like a newcomer, by a probe, before it joins a cluster. Shared random
draws are made from the seed and never sent; a frozen tier is sent once and kept by the client; the
leaf never leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from statistics import mean
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, Strict, model_validator
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors, fresh
from fedgrove.adapters.algebra import product_norm, subtract_products
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.adapters.lowrank import Split, leading, product_mean, truncated
from fedgrove.adapters.subspace import (
    bases,
    basis,
    orthogonal_projector_penalty,
    overlap_by_layer,
    principal_angle_distances,
    rough_angles,
)
from fedgrove.clustering.landmarks import joined, landmarks
from fedgrove.clustering.spectral import Clusters, match, spectral
from fedgrove.ground.errors import AdapterError, JobError
from fedgrove.ground.plain import Plain
from fedgrove.methods.contract import (
    ClientInfo,
    Live,
    Method,
    Penalty,
    Plan,
    Setting,
    Step,
    Trained,
    Update,
    WeightedOptions,
    reveal,
    shares,
)
from fedgrove.methods.rule import Arrived, Needs, Outcome, Round, ServerRule

TIERS = ("root", "cluster", "leaf")
Tensors = dict[str, Tensor]  # site -> [out, r]


class HiLoRAOptions(WeightedOptions):
    """HiLoRA's keys."""

    fractions: Annotated[tuple[float, ...], Strict(False)] = Field(
        (0.3, 0.4, 0.3),
        description="Shares of run.rounds for root, cluster and leaf, by largest remainder, at "
        "least one round each. A share of 0 leaves the cluster or the leaf tier out.",
        examples=[[0.5, 0.0, 0.5], [0.5, 0.5, 0.0]],
    )
    tier_ranks: Annotated[tuple[int, ...], Strict(False)] | None = Field(
        None,
        description="Ranks of root, cluster and leaf for a client of the global rank R; a client "
        "of rank r has r / R of them. Not set: the client's own rank in each tier.",
        examples=[[8, 4, 4]],
    )
    balanced: bool = Field(
        False,
        description="Split the singular values evenly over B and A, instead of all into A with "
        "orthonormal B.",
    )
    tau_rel: float = Field(
        0.0,
        ge=0,
        description="Ends the root tier as soon as the relative step of its update is not larger; "
        "0: never early.",
    )
    ema: float = Field(
        0.9, ge=0, lt=1, description="Weight of the past in the moving average of each client's B."
    )
    basis: Literal["B", "B - B_start"] = Field(
        "B",
        description="What clients are grouped by: their B after local training, or what training "
        "changed in it.",
    )
    k_min: int = Field(
        2, ge=1, description="Fewest clusters; 1 lets clients that are alike stay together."
    )
    k_max: int = Field(10, ge=1, description="Most clusters; never more than the clients less one.")
    gamma_c: float = Field(
        0.1, ge=0, description="Penalty that keeps cluster and leaf orthogonal to the root."
    )
    gamma_l: float = Field(
        0.1, ge=0, description="Penalty that keeps the leaf orthogonal to the cluster."
    )
    probe: float = Field(
        4.0,
        gt=0,
        description="Local work of the probe that places a newcomer, in units of a round's local "
        "work.",
    )

    @model_validator(mode="after")
    def _agree(self) -> HiLoRAOptions:
        shares, ranks = self.fractions, self.tier_ranks
        if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or shares[0] == 0:
            raise ValueError(
                f"method.fractions = {list(shares)} must be three shares of 0 or more, for root, "
                "cluster and leaf, and the root's above 0; for example [0.3, 0.4, 0.3]."
            )
        if ranks is not None and (len(ranks) != 3 or min(ranks) < 1):
            raise ValueError(
                f"method.tier_ranks = {list(ranks)} must be three ranks of 1 or more, for root, "
                "cluster and leaf; for example [8, 4, 4]."
            )
        if self.k_max < self.k_min:
            raise ValueError(
                f"method.k_min = {self.k_min} is above method.k_max = {self.k_max}; lower it, or "
                "raise the other."
            )
        return self


class ClusterMeans:
    """Clusters by the subspaces of B; a client gets the product mean of its cluster."""

    needs: ClassVar[Needs] = Needs(
        every_weight=True, rank=True, seed=True, options=("k_min", "k_max", "balanced")
    )

    def __init__(self, options: HiLoRAOptions, round: Round):
        self.options = options
        self.round = round
        self.landmarks: list[int] = []  # rows of the distances
        self.distances: Tensor | None = None  # float64 [M, M]
        #: [N, M] from everyone to the landmarks, where not all are
        self.rough: Tensor | None = None
        self._seen = 0  # sites

    def look(self, given: Arrived) -> None:
        self.see([each.B for each in given.factors])

    def see(self, clients: Sequence[Tensor]) -> None:
        """Add the distances between the clients' B, each [out, rank], at one site."""
        self.landmarks = landmarks(len(clients)).tolist()
        chosen = [clients[n] for n in self.landmarks]
        spans = [basis(B.double(), min(B.shape)) for B in chosen]
        apart = principal_angle_distances(spans) / len(self.round.sites)
        if self.distances is None:
            self.distances = torch.zeros_like(apart)
        self.distances += apart
        if len(chosen) < len(clients):
            # by their number: the projections of two sites are independent, whatever they are called
            rough = rough_angles(clients, self.landmarks, str(self._seen))
            self.rough = rough if self.rough is None else self.rough.add_(rough)
        self._seen += 1

    @cached_property
    def found(self) -> Clusters:
        """The clusters of the landmarks seen: of all clients, up to ``landmarks.EXACT``."""
        if self.distances is None:
            raise AdapterError("No site was compared: look at every site before the first mean.")
        options = self.options
        return spectral(
            self.distances.numpy(),
            options.k_min,
            options.k_max,
            self.round.seed,
        )

    @cached_property
    def labels(self) -> list[int]:
        """The cluster of every client seen."""
        found = self.found.labels
        if self.rough is None:
            own: list[int] = found.tolist()
            return own
        everyone = joined(found, self.rough.numpy())
        everyone[self.landmarks] = found
        placed: list[int] = everyone.tolist()
        return placed

    def site(self, given: Arrived) -> Outcome:
        own = list(given.factors)
        labels = self.labels
        for label in range(self.found.k):
            members = [n for n, each in enumerate(labels) if each == label]
            most = max(given.factors[n].rank for n in members)
            common = self._mean(given, members, most)
            for n in members:
                own[n] = leading(
                    common,
                    own[n].rank,
                    own[n].scale,
                    split_of(self.options),
                )
        everybody = range(len(own))
        whole = self._mean(given, everybody, given.rank)
        return Outcome(whole, own)

    def notes(self) -> list[str]:
        return [f"Clusters: {self.found.k}."]

    def artefacts(self, clients: Sequence[str]) -> Plain:
        compared = [clients[n] for n in self.landmarks]
        by_name = dict(zip(clients, self.labels, strict=True))
        content: Plain = {
            "clients": compared,
            "labels": self.found.labels.tolist(),
            "distances": [] if self.distances is None else self.distances.tolist(),
            "eigenvalues": self.found.eigenvalues.tolist(),
            "sigma": self.found.sigma,
        }
        known = set(compared)
        if len(compared) < len(clients):
            content["placed"] = {name: by_name[name] for name in clients if name not in known}
        return {"clusters.json": content}

    def _mean(
        self,
        given: Arrived,
        members: Sequence[int],
        rank: int,
    ) -> Factors:
        return truncated(
            [given.factors[n] for n in members],
            [given.weights[n] for n in members],
            rank,
            given.scale,
            split_of(self.options),
            site=given.name,
        )


def split_of(options: HiLoRAOptions) -> Split:
    """Where the singular values of a tier go."""
    if options.balanced:
        return "balanced"
    return "left"


@dataclass(frozen=True)
class Done:
    """A tier that is trained to its end."""

    tier: str
    first: int  # its first round
    last: int  # its last


@dataclass(frozen=True, eq=False)
class Grouping:
    """The one clustering, at the end of the root tier."""

    clients: list[str]  # the rows of the distances
    distances: Tensor  # float64 [M, M]; of many clients M landmarks
    eigenvalues: Tensor  # float64 [M]
    sigma: float


@dataclass(frozen=True, eq=False)
class HiLoRAState:
    """The server's memory."""

    tier: str  # the one in training
    since: int  # its first round
    until: int  # its last
    lengths: dict[str, int]  # rounds of each tier
    done: list[Done] = field(default_factory=list)
    #: relative step of the root tier by round; None for the first
    steps: list[float | None] = field(default_factory=list)
    root: Adapter | None = None  # None: still the shared draw
    #: client -> site -> moving average of its normalised B, [out, r]; empty after the root tier
    ema: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)  # client -> cluster
    clusters: list[Adapter | None] = field(default_factory=list)  # None: still the shared draw
    grouping: Grouping | None = None
    late: list[str] = field(default_factory=list)  # clients that were placed by a probe
    #: client -> the frozen tiers that it was sent and keeps
    holds: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Tiers:
    """What goes down: the tier in training, and those tiers that the client does not hold."""

    tier: str
    root: Adapter | None = None
    cluster: Adapter | None = None
    place: bool = False  # no cluster yet: a probe finds one
    placed: str = ""  # which one it was, in words


@dataclass(frozen=True, eq=False)
class Kept:
    """A client's frozen tiers, and its leaf, which never leaves it; None: not there yet."""

    root: Adapter | None = None
    cluster: Adapter | None = None
    leaf: Adapter | None = None


@dataclass(frozen=True, eq=False)
class Probe:
    """The B of a probe's fresh adapter, by site [out, r]."""

    B: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Upload:
    """The trained root or cluster tier, or the probe of who has no cluster; nothing of a leaf."""

    adapter: Adapter | None = None
    probe: Probe | None = None


class HiLoRA(Method):
    name = "hilora"
    title = "HiLoRA"
    laid_out = ("lengths",)
    pictures = "fedgrove.report.pictures.clusters:clusters"
    paper = "arXiv 2603.02785"
    trains = "A, B of one tier at a time"
    shares = "root and cluster tiers"
    keeps = "leaf tier"
    ranks = "mixed"
    tiers: ClassVar[tuple[str, ...]] = TIERS
    centres = "weights"
    State, Offer, Mine, Sent, Probed = HiLoRAState, Tiers, Kept, Upload, Probe
    Options = HiLoRAOptions
    Rule: ClassVar[type[ServerRule]] = ClusterMeans

    def __init__(self, options: HiLoRAOptions, setting: Setting):
        super().__init__(options, setting)
        smallest = min(min(site.in_features, site.out_features) for site in setting.sites.values())
        if options.tier_ranks is not None and max(options.tier_ranks) > smallest:
            raise JobError(
                f"method.tier_ranks = {list(options.tier_ranks)} has a rank above {smallest}, the "
                f"smallest side of an adapted layer; lower it to {smallest} or less."
            )
        lengths = tier_lengths(setting.rounds, options.fractions)
        self.lengths = dict(zip(TIERS, lengths, strict=True))

    @property
    def complete_from(self) -> int:
        last = [length for length in self.lengths.values() if length][-1]
        return self.setting.rounds - last + 1

    # ------------------------------------------------------------------ server
    def needs_each(self) -> str:
        return "its clusters are built from each client's own B"

    def most_rank(self) -> int:
        return max(self._full(tier) for tier in TIERS)

    def begin(self, clients: Sequence[ClientInfo]) -> HiLoRAState:
        return HiLoRAState("root", 1, self.lengths["root"], dict(self.lengths))

    def offer(
        self,
        state: HiLoRAState,
        round: int,
        client: ClientInfo,
    ) -> Tiers:
        holds = state.holds.get(client.name, [])
        offer = Tiers(state.tier)
        if state.root is not None and "root" not in holds:
            offer = replace(offer, root=self._cut(state.root, "root", client))
        if state.tier == "root" or not self.lengths["cluster"]:
            return offer
        label = state.labels.get(client.name)
        if label is None:
            return replace(offer, place=True)
        cluster = state.clusters[label]
        if cluster is None or "cluster" in holds:
            return offer
        return replace(offer, cluster=self._cut(cluster, "cluster", client))

    def aggregate(
        self,
        state: HiLoRAState,
        round: int,
        updates: Sequence[Update[Upload]],
    ) -> HiLoRAState:
        if state.tier == "root":
            state = self._root(state, updates)
        else:
            state = self._below(state, updates)
        if round == state.until or self._settled(state):
            return self._advance(state, round)
        return state

    def welcome(
        self,
        state: HiLoRAState,
        client: ClientInfo,
        probe: Probe | None,
    ) -> Tiers:
        offer = self.offer(state, self.setting.rounds + 1, client)
        if probe is None or not offer.place or not any(state.clusters):
            return offer
        winner, scores = self._closest(state.clusters, probe.B)
        cluster = self._cut(state.clusters[winner] or {}, "cluster", client)
        listed = ", ".join(_score_in_words(score) for score in scores)
        placed = f"cluster {winner} of {len(scores)} (mean cos² with each: {listed})"
        return replace(offer, place=False, cluster=cluster, placed=placed)

    def global_assembly(self, state: HiLoRAState) -> Assembly | None:
        """The root, as long as it is what everyone runs."""
        if state.root is None or state.tier != "root":
            return None
        return Assembly((Term("root", state.root),))

    def artefacts(self, state: HiLoRAState) -> Plain:
        """``clusters.json``: who is with whom and why, and how much of the root each cluster's
        subspace has, by layer.
        """
        found = state.grouping
        if found is None:
            return {}
        content = {
            "clients": list(found.clients),
            "labels": [state.labels[name] for name in found.clients],
            "eigenvalues": found.eigenvalues.tolist(),
            "distances": found.distances.tolist(),
            "sigma": found.sigma,
            "basis": self.options.basis,
            "late": {name: state.labels[name] for name in state.late},
            "tiers": [{"tier": d.tier, "first": d.first, "last": d.last} for d in state.done],
            "steps": list(state.steps),
            "layers": sorted({site.layer for site in self.setting.sites.values()}),
            "overlap": {"root-cluster": self._overlaps(state)},
            **self._placed(state, found),
            "chance": {f"{a}-{b}": self._chance(a, b) for a, b in combinations(TIERS, 2)},
        }
        return {"clusters.json": content}

    def _placed(self, state: HiLoRAState, found: Grouping) -> Plain:
        """{"placed": the clusters of those that were placed by landmarks}; {} where none was."""
        known = {*found.clients, *state.late}
        placed = {name: label for name, label in state.labels.items() if name not in known}
        if placed:
            return {"placed": placed}
        return {}

    def _overlaps(self, state: HiLoRAState) -> list[list[float] | None]:
        """By layer, how much of the root each cluster spans; None for one that nobody trained."""
        root = bases(state.root or {})
        overlaps: list[list[float] | None] = []
        for cluster in state.clusters:
            if cluster is None:
                overlaps.append(None)
            else:
                overlaps.append(overlap_by_layer(root, bases(cluster), self.setting.sites))
        return overlaps

    def _chance(self, one: str, other: str) -> float:
        """The overlap that two random tiers would have."""
        sizes = [site.out_features for site in self.setting.sites.values()]
        return max(self._full(one), self._full(other)) / mean(sizes)

    def _root(
        self,
        state: HiLoRAState,
        updates: Sequence[Update[Upload]],
    ) -> HiLoRAState:
        """The root tier after a round."""
        before, after = state.root, self._mean(updates, "root")
        ema = dict(state.ema)
        for update in updates:
            adapter = update.content.adapter or {}
            ema[update.client] = self._follow(ema.get(update.client), adapter, before)
        # ‖ΔW' − ΔW‖ / (‖ΔW‖ + ε); the first step is from zero, and never a small one
        step = None
        if before is not None:
            step = product_norm(subtract_products(after, before)) / (product_norm(before) + 1e-12)
        return replace(
            state,
            root=after,
            ema=ema,
            steps=[*state.steps, step],
        )

    def _settled(self, state: HiLoRAState) -> bool:
        """Whether the root tier may end early, in favour of the tiers below."""
        below = self.lengths["cluster"] + self.lengths["leaf"]
        if state.tier != "root" or below == 0 or self.options.tau_rel == 0:
            return False
        step = state.steps[-1]
        return step is not None and step <= float(self.options.tau_rel)

    def _follow(
        self,
        past: Tensors | None,
        adapter: Adapter,
        start: Adapter | None,
    ) -> Tensors:
        """``B̄ ← λ B̄ + (1 − λ) B / ‖B‖`` per site, from zero; ``B`` or its change since the start
        of the round, all [out, r].
        """
        weight = self.options.ema
        result: Tensors = {}
        for site, factors in adapter.items():
            B = factors.B.double()
            if self.options.basis == "B - B_start" and start is not None:
                begun = leading(
                    start[site],
                    factors.rank,
                    factors.scale,
                    split_of(self.options),
                )
                B = B - begun.B.double()
            now = (1 - weight) * B / B.norm().clamp_min(torch.finfo(B.dtype).tiny)
            if past is not None:
                now = weight * past[site].double() + now
            result[site] = now.to(factors.B.dtype)
        return result

    def _group(self, state: HiLoRAState) -> HiLoRAState:
        """The clustering, once: principal angles between the clients' bases, averaged over sites;
        then spectral.
        """
        names = sorted(state.ema)
        seed = self.setting.integer("hilora", "clusters")
        rule = ClusterMeans(self.options, Round(self.setting.sites, seed=seed))
        for site in self.setting.sites:
            rule.see([state.ema[name][site] for name in names])
        found = rule.found
        assert rule.distances is not None
        eigenvalues = torch.from_numpy(found.eigenvalues.copy())
        compared = [names[n] for n in rule.landmarks]
        grouping = Grouping(compared, rule.distances, eigenvalues, found.sigma)
        labels = dict(zip(names, rule.labels, strict=True))
        clusters: list[Adapter | None] = [None] * found.k
        return replace(state, labels=labels, clusters=clusters, grouping=grouping)

    def _below(
        self,
        state: HiLoRAState,
        updates: Sequence[Update[Upload]],
    ) -> HiLoRAState:
        """Cluster tier: the mean within each cluster. Leaf tier: nothing arrives. In both,
        latecomers are placed.
        """
        labels, holds, clusters = dict(state.labels), dict(state.holds), list(state.clusters)
        if state.tier == "cluster":
            for number in range(len(clusters)):
                members = [u for u in updates if labels.get(u.client) == number]
                if members:
                    clusters[number] = self._mean(members, "cluster")
        late = list(state.late)
        for update in updates:
            holds[update.client] = ["root"]
            if state.tier == "leaf" and update.client in labels:
                holds[update.client] = ["root", "cluster"]
            probe = update.content.probe
            if probe is not None and any(clusters):
                labels[update.client] = self._closest(clusters, probe.B)[0]
                late.append(update.client)
        return replace(
            state,
            labels=labels,
            holds=holds,
            clusters=clusters,
            late=late,
        )

    def _advance(self, state: HiLoRAState, round: int) -> HiLoRAState:
        """The next tier, where there is one. Rounds that an early stop saved go to the tiers that
        are left.
        """
        tier, lengths = state.tier, state.lengths
        done = [*state.done, Done(tier, state.since, round)]
        later = [name for name in TIERS[TIERS.index(tier) + 1 :] if lengths[name]]
        if not later:
            return replace(state, done=done)
        if round < state.until:
            wanted = [self.options.fractions[TIERS.index(name)] for name in later]
            again = tier_lengths(self.setting.rounds - round, wanted)
            lengths = {
                **lengths,
                **dict(zip(later, again, strict=True)),
            }
        if tier == "root" and later[0] == "cluster":
            state = self._group(state)
        return replace(
            state,
            tier=later[0],
            since=round + 1,
            until=round + lengths[later[0]],
            lengths=lengths,
            done=done,
            ema={},
        )

    def _mean(
        self,
        updates: Sequence[Update[Upload]],
        tier: str,
    ) -> Adapter:
        """``Σ p_i s_i B_i A_i`` truncated to the tier's full rank."""
        rank = self._full(tier)
        return product_mean(
            [update.content.adapter or {} for update in updates],
            shares(updates, self.options.weights),
            rank,
            self.setting.scale(rank),
            split_of(self.options),
        )

    def _closest(
        self,
        clusters: Sequence[Adapter | None],
        B: Tensors,
    ) -> tuple[int, list[float | None]]:
        """The trained cluster whose subspace is closest to a probe's B, by site [out, r], and the
        score of each.
        """
        probe = {site: basis(value.double()).numpy() for site, value in B.items()}
        trained = []
        spans = []
        for number, cluster in enumerate(clusters):
            if cluster is not None:
                trained.append(number)
                spans.append({site: span.numpy() for site, span in bases(cluster).items()})
        winner, scores = match(probe, spans)
        listed: list[float | None] = [None] * len(clusters)
        for number, score in zip(trained, scores, strict=True):
            listed[number] = score
        return trained[winner], listed

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Tiers,
        mine: Kept,
        round: int,
    ) -> Plan:
        if offer.place:
            return self._probing(client, offer, mine)
        return [Step(self.personal(client, offer, mine), penalty=self.penalty(client, offer, mine))]

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Tiers,
        mine: Kept,
        round: int,
    ) -> tuple[Upload, Kept]:
        last = trained[-1]
        root = last.adapter("root")
        if offer.tier == "root":
            return Upload(root), mine
        if offer.place:
            return Upload(probe=self.probe_report(client, trained, offer)), Kept(root)
        if offer.tier == "cluster":
            return Upload(last.adapter("cluster")), Kept(root)
        tiers = {term.name: term.adapter for term in last.assembly.terms}
        return Upload(), Kept(root, tiers.get("cluster"), tiers["leaf"])

    def probe(self, client: ClientInfo, offer: Tiers) -> Plan | None:
        if not offer.place:
            return None
        return self._probing(client, offer, Kept())

    def probe_report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Tiers,
    ) -> Probe:
        cluster = trained[-1].adapter("cluster")
        return Probe({site: factors.B for site, factors in cluster.items()})

    def personal(
        self,
        client: ClientInfo,
        offer: Tiers,
        mine: Kept,
    ) -> Assembly:
        names = ["root"]
        if self.lengths["cluster"] and offer.tier != "root" and not offer.place:
            names.append("cluster")
        if offer.tier == "leaf":
            names.append("leaf")
        tier = offer.tier
        terms = [self._term(name, client, offer, mine, train=name == tier) for name in names]
        return Assembly(tuple(terms))

    def penalty(
        self,
        client: ClientInfo,
        offer: Tiers,
        mine: Kept,
    ) -> Penalty | None:
        return self._penalty(self.personal(client, offer, mine), offer.tier)

    def client_artefacts(
        self,
        client: ClientInfo,
        offer: Tiers,
        mine: Kept,
    ) -> Plain:
        """For ``clusters.json``: how much of each frozen tier the leaf spans, by layer."""
        own = reveal(mine)
        if own.root is None or own.cluster is None or own.leaf is None:
            return {}
        leaf = bases(own.leaf)
        found = {}
        for name, above in (("root", own.root), ("cluster", own.cluster)):
            overlap = overlap_by_layer(bases(above), leaf, self.setting.sites)
            found[f"{name}-leaf"] = {client.name: overlap}
        return {"clusters.json": {"overlap": found}}

    def _probing(
        self,
        client: ClientInfo,
        offer: Tiers,
        mine: Kept,
    ) -> list[Step]:
        """A fresh adapter on ``W0 + root``, as any client trains it in the first round of the
        cluster tier.
        """
        root = self._term(
            "root",
            client,
            offer,
            mine,
            train=False,
        )
        assembly = Assembly((root, Term("cluster", self._draw("cluster", client))))
        penalty = self._penalty(assembly, "cluster")
        return [Step(assembly, penalty=penalty, share=self.options.probe)]

    def _term(
        self,
        name: str,
        client: ClientInfo,
        offer: Tiers,
        mine: Kept,
        *,
        train: bool,
    ) -> Term:
        """A tier as the client holds it, else as it was offered, else as the shared draw."""
        held = {
            "root": mine.root,
            "cluster": mine.cluster,
            "leaf": mine.leaf,
        }
        came = {"root": offer.root, "cluster": offer.cluster}
        adapter = held[name]
        if adapter is None:
            adapter = came.get(name)
        if adapter is None:
            adapter = self._draw(name, client)
        if name == "leaf":
            return Term(name, adapter, train="AB" if train else "", home="client")
        return Term(name, adapter, train="AB" if train else "")

    def _penalty(self, assembly: Assembly, tier: str) -> Penalty | None:
        """``γ ‖B_frozenᵀ B‖²`` over the tiers above, summed over sites; ``B_frozen``
        orthonormal.
        """
        gammas = {
            "root": self.options.gamma_c,
            "cluster": self.options.gamma_l,
        }
        frozen: dict[str, Tensors] = {}
        for term in assembly.terms:
            if not term.train and gammas.get(term.name, 0.0) > 0:
                frozen[term.name] = self._orthonormal(term.adapter)
        if not frozen or not any(term.train for term in assembly.terms):
            return None  # a client that is not placed yet runs frozen tiers alone

        def penalty(live: Live) -> Tensor:
            """Over the live B, each [out, r]: a scalar, []."""
            total = torch.zeros(())
            for name, frames in frozen.items():
                for site, factors in live.terms[tier].items():
                    frames[site] = frames[site].to(factors.B)  # moves once, then stays
                    overlap = orthogonal_projector_penalty(frames[site], factors.B)
                    total = total.to(factors.B) + gammas[name] * overlap
            return total

        return penalty

    def _orthonormal(self, adapter: Adapter) -> Tensors:
        """The frozen B's: orthonormal as they are, unless the singular values were split; a zero B
        has no span. By site [out, r].
        """
        if not self.options.balanced:
            return {site: factors.B for site, factors in adapter.items()}
        frames: Tensors = {}
        for site, factors in adapter.items():
            frames[site] = factors.B
            if factors.B.any():
                frames[site] = basis(factors.B)
        return frames

    # ------------------------------------------------------------------ ranks and draws
    def _full(self, tier: str) -> int:
        """The tier's rank at the server."""
        ranks = self.options.tier_ranks
        if ranks is None:
            return self.setting.rank
        return int(ranks[TIERS.index(tier)])

    def _rank(self, tier: str, client: ClientInfo) -> int:
        return max(1, self._full(tier) * client.rank // self.setting.rank)

    def _draw(self, tier: str, client: ClientInfo) -> Adapter:
        """Zero ``B`` and the tier's one random ``A``, the same for all clients; the root's is that
        of every method.
        """
        if tier == "root":
            purpose = "init"
        else:
            purpose = tier
        rng = self.setting.rng("shared", purpose)
        rank = self._rank(tier, client)
        scale = self.setting.scale(rank)
        drawn: Adapter = {}
        for site, whole in fresh(self.setting.sites, self._full(tier), 1.0, rng).items():
            drawn[site] = Factors(
                whole.A[:rank].clone(),
                whole.B[:, :rank].clone(),
                scale,
            )
        return drawn

    def _cut(
        self,
        adapter: Adapter,
        tier: str,
        client: ClientInfo,
    ) -> Adapter:
        """The best part of a tier that the client's rank allows, at the client's scale."""
        rank = self._rank(tier, client)
        scale, split = self.setting.scale(rank), split_of(self.options)
        return {site: leading(factors, rank, scale, split) for site, factors in adapter.items()}


def tier_lengths(rounds: int, fractions: Sequence[float]) -> list[int]:
    """``rounds`` shared out by largest remainder (ties to the first), at least one for each share
    above 0.

    Raises ``JobError`` where there are fewer rounds than shares above 0.
    """
    wanted = [number for number, share in enumerate(fractions) if share > 0]
    if rounds < len(wanted):
        names = ", ".join(TIERS[number] for number in wanted)
        raise JobError(
            f"run.rounds = {rounds} is too few for HiLoRA's tiers ({names}), which need a round "
            f"each; set run.rounds to {len(wanted)} or more."
        )
    total = math.fsum(fractions)
    quotas = [rounds * share / total for share in fractions]
    lengths = [int(quota + 1e-9) for quota in quotas]
    remainders: list[tuple[float, int]] = []
    for number in wanted:
        left = quotas[number] - lengths[number]
        remainders.append((-round(left, 9), number))
    missing = rounds - sum(lengths)
    for _, number in sorted(remainders)[:missing]:
        lengths[number] += 1
    for number in wanted:
        if lengths[number] == 0:
            longest = max(wanted, key=lambda other: lengths[other])
            lengths[longest] -= 1
            lengths[number] = 1
    return lengths


def _score_in_words(score: float | None) -> str:
    if score is None:
        return "untrained"
    return f"{score:.3f}"
