"""The rules that group clients: first all distances, site by site, then the means of the groups in
a second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.distance import between, layers_of
from fedgrove.adapters.groups import group_means
from fedgrove.adapters.lowrank import product_svd
from fedgrove.adapters.subspace import basis, principal_angle_distances
from fedgrove.aggregate.options import HiOptions, Options, TreeOptions
from fedgrove.aggregate.rule import Result, Rule, from_svd
from fedgrove.clustering.spectral import spectral
from fedgrove.clustering.tree import layer_cuts, merge_tree


class FedTreeLoRA(Rule):
    """One merge tree, cut deeper from layer to layer; a client gets the mean of its group in each
    layer.
    """

    name = "fedtreelora"
    Options: ClassVar[type[Options]] = TreeOptions
    equal_ranks = True
    averages_factors = True
    every_weight = True
    passes = 2

    def prepare(self, advance: Callable[[], None]) -> None:
        count, layers = len(self.task.sources), layers_of(self.task.sites)
        distances = torch.zeros(len(layers), count, count, dtype=torch.float64)
        for place, sites in enumerate(layers.values()):
            for site in sites:
                common = self.common(site, [source.read(site) for source in self.task.sources])
                only = {site: self.task.sites[site]}
                apart = between([{site: each.B} for each in common], only, self.options.distance)[0]
                distances[place] += apart / len(sites)
                advance()
        self.merges = merge_tree(distances.mean(0).numpy(), self.options.linkage)
        options = self.options
        cuts = layer_cuts(
            self.merges, list(distances.numpy()), options.tau, options.K, options.fixed_k
        )
        self.cuts = dict(zip(layers, cuts, strict=True))
        counts = [cut.count for cut in cuts]
        self.notes.append(
            f"Groups from the first layer to the last: {', '.join(map(str, counts))}."
        )

    def site(self, name: str, factors: list[Factors]) -> Result:
        labels = self.cuts[self.task.sites[name].layer].labels.tolist()
        means = group_means(
            [{name: each} for each in self.common(name, factors)], labels, self.parts
        )
        whole = means.everyone[name]
        own = self.home(name, [means.own[label][name] for label in labels])
        return Result(whole, own, self.noise(whole, factors))

    def artefacts(self) -> dict[str, Any]:
        names = [source.name for source in self.task.sources]
        layers = []
        for layer, cut in self.cuts.items():
            groups: list[list[str]] = [[] for _ in range(cut.count)]
            for name, label in zip(names, cut.labels.tolist(), strict=True):
                groups[label].append(name)
            layers.append(
                {"layer": layer, "count": cut.count, "score": cut.score, "groups": groups}
            )
        return {"tree.json": {"clients": names, "layers": layers, "merges": self.merges.tolist()}}


class HiLoRA(Rule):
    """Clusters by the subspaces of B; a client gets the product mean of its cluster, the global one
    is everyone's.
    """

    name = "hilora"
    Options: ClassVar[type[Options]] = HiOptions
    takes_rank = True
    every_weight = True
    passes = 2

    def prepare(self, advance: Callable[[], None]) -> None:
        count, sites = len(self.task.sources), self.task.sites
        distances = torch.zeros(count, count, dtype=torch.float64)
        for site in sites:
            spans = []
            for source in self.task.sources:
                B = source.read(site).B
                spans.append(basis(B, min(B.shape)))
            distances += principal_angle_distances(spans) / len(sites)
            advance()
        self.distances = distances
        self.found = spectral(
            distances.numpy(), self.options.k_min, self.options.k_max, self.options.seed
        )
        self.notes.append(f"Clusters: {self.found.k}.")

    def site(self, name: str, factors: list[Factors]) -> Result:
        split: Any = "balanced" if self.options.balanced else "left"
        rank, scale = self.top_rank(name), self.scale(name)
        whole = from_svd(product_svd(factors, self.parts, rank), rank, scale, split)
        places = [source.places[name] for source in self.task.sources]
        own: list[Factors] = [whole] * len(factors)
        for label in range(self.found.k):
            members = [
                row for row, other in enumerate(self.found.labels.tolist()) if other == label
            ]
            total = sum(self.parts[row] for row in members)
            weights = [self.parts[row] / total for row in members]
            most = max(places[row].rank for row in members)
            triplets = product_svd([factors[row] for row in members], weights, most)
            for row in members:
                own[row] = from_svd(triplets, places[row].rank, places[row].scale, split)
        return Result(whole, own, self.noise(whole, factors))

    def artefacts(self) -> dict[str, Any]:
        content = {
            "clients": [source.name for source in self.task.sources],
            "labels": self.found.labels.tolist(),
            "distances": self.distances.tolist(),
            "eigenvalues": self.found.eigenvalues.tolist(),
            "sigma": self.found.sigma,
        }
        return {"clusters.json": content}
