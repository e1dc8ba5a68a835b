"""Fed-HeLLo: clients that can afford different numbers of layers train different layers of one
global LoRA.

Source: Zhang et al., "Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with
Heterogeneous LoRA Allocation", arXiv 2506.12213. Everybody runs all layers and trains some; a
layer's LoRA is averaged over those that trained it. Which ones: by geometry (GD-HLA: the share of
clients per layer rises with depth, ``inverted_triangle``; falls,
``triangle``; is high at both ends, ``bottleneck``; or ``uniform``), the same each round; in that
shape but drawn again each round (RGD-HLA, ``randomised``); or by Fisher information (FIM-HLA,
``allocation = "fim"``), after a warm start.

Of its Fisher scores a client trains the best layers (``choice = "best"``, ours), or draws them anew
each round as the authors' code does (``choice = "groups"``): k-means puts the layers, by the summed
Frobenius norms of the Fisher information of A and B, into three groups, and a layer of the lowest
group has the weight 1, of the middle 2, of the highest 3. (Their code takes the numbers that
k-means gives its groups for their order; ours orders them by score.)

Where we differ: FIM-HLA scores layers on each client's own training data, once, after its first
round beyond the warm start (the paper: on the server's proxy data); the warm start is the uniform
randomised allocation, and it counts in the budget. Affordable layers are shares dealt to the
clients in turn (``layers``). With ``layers = [1.0]`` this is FedIT.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods._layers import part, score_groups, shaped_rows
from fedgrove.methods._some_layers import LayerOptions, LayersState, SomeLayers, SomeOfIt
from fedgrove.methods.contract import ClientInfo, Setting, Step, Trained
from fedgrove.methods.records import OneAdapter


class HeLLoOptions(LayerOptions):
    """The keys of ``[method]`` for Fed-HeLLo."""

    allocation: Literal["fim", "triangle", "inverted_triangle", "bottleneck", "uniform"] = Field(
        "fim",
        description="Which layers a client trains: those with the largest Fisher scores on its own "
        "data, or by a "
        "geometric shape of the clients per layer.",
    )
    choice: Literal["best", "groups"] = Field(
        "best",
        description="With allocation = fim: a client's layers are those with the largest traces of "
        "the Fisher information, or are drawn each round with the weights 1, 2, 3 of three groups "
        "of Frobenius norms (the authors' code).",
    )
    randomised: bool = Field(
        False,
        description="Draw anew each round who trains which layer; the shape stays. Not for "
        "allocation = fim.",
    )
    warm_rounds: int | None = Field(
        None,
        ge=1,
        description="Rounds of uniform randomised allocation before Fisher scores are measured. "
        "Not set: a fifth of "
        "run.rounds, at least one.",
        examples=[2],
    )
    batches: int = Field(
        8,
        ge=0,
        description="Batches that Fisher scores are measured on; 0: one pass over the data.",
    )


@dataclass(frozen=True, eq=False)
class Scores:
    """What stays with a client: the Fisher score of each layer, by its number; empty before it was
    measured.
    """

    scores: dict[str, float] = field(default_factory=dict)


class FedHeLLo(SomeLayers):
    name = "fed-hello"
    title = "Fed-HeLLo"
    laid_out = ("warm",)
    paper = "arXiv 2506.12213"
    trains = "A, B of some layers"
    shares = "those layers"
    keeps = "Fisher scores"
    Mine = Scores
    Options: ClassVar[type[contract.Options]] = HeLLoOptions

    def __init__(self, options: HeLLoOptions, setting: Setting):
        super().__init__(options, setting)
        self.warm = options.warm_rounds or max(1, round(setting.rounds / 5))

    # ------------------------------------------------------------------ server
    def offer(
        self,
        state: LayersState,
        round: int,
        client: ClientInfo,
    ) -> SomeOfIt:
        if client.name not in state.rows:  # a newcomer
            return SomeOfIt(state.whole)
        if self._by_fisher and round > self.warm:
            return SomeOfIt(state.whole, count=state.counts[client.name])
        return SomeOfIt(state.whole, layers=state.rows[client.name])

    @property
    def _by_fisher(self) -> bool:
        return bool(self.options.allocation == "fim")

    def reads(self) -> str:
        if self._by_fisher:
            return "the Fisher scores that choose its layers"
        return ""

    def unmeasured(self) -> str:
        if self._by_fisher:
            return "only the client knows which layers it trains"
        return ""

    def draw(self, counts: Sequence[int], round: int) -> list[list[int]]:
        rng = None
        if self._by_fisher or self.options.randomised:
            rng = self.setting.rng(round, "allocation")
        shape = self.options.allocation
        if self._by_fisher:
            shape = "uniform"
        return shaped_rows(shape, counts, len(self.layers), rng)

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: SomeOfIt,
        mine: Scores,
        round: int,
    ) -> Generator[Step, Trained, None]:
        scores = mine.scores
        if offer.layers is None and not scores:
            probe = Assembly((Term("global", offer.adapter),))
            looked = yield Step(
                probe, head=False, measure="fisher", stream="fisher", count=self.options.batches
            )
            scores = self._scores(looked)
        chosen = offer.layers
        if chosen is None:
            chosen = self._chosen(
                client,
                offer.count or len(self.layers),
                scores,
                round,
            )
        sites = self.setting.sites
        terms = [Term("global", part(offer.adapter, sites, chosen))]
        if len(chosen) < len(self.layers):
            others = part(offer.adapter, sites, chosen, inside=False)
            terms.append(Term("frozen", others, train=""))
        yield Step(Assembly(tuple(terms)))

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: SomeOfIt,
        mine: Scores,
        round: int,
    ) -> tuple[OneAdapter, Scores]:
        if trained[0].scores is not None:
            mine = Scores(self._scores(trained[0]))
        return OneAdapter(trained[-1].adapter("global")), mine

    def _chosen(
        self,
        client: ClientInfo,
        count: int,
        scores: Mapping[str, float],
        round: int,
    ) -> list[int]:
        """The ``count`` layers to train by the client's own scores: the best (ties: shallower), or
        drawn with the weights of their groups.
        """
        if self.options.choice == "best":
            ranked = sorted(self.layers, key=lambda layer: -scores[str(layer)])
            return sorted(ranked[:count])
        groups = score_groups([scores[str(layer)] for layer in self.layers])
        odds = torch.tensor([1.0 + group for group in groups], dtype=torch.float64)
        rng = self.setting.rng(round, client.name, "layers")
        drawn = torch.multinomial(
            odds,
            count,
            replacement=False,
            generator=rng,
        )
        return sorted(self.layers[place] for place in drawn.tolist())

    def _scores(self, looked: Trained) -> dict[str, float]:
        """For each layer the trace of the empirical Fisher matrix of its A's and B's, or the sum of
        the Frobenius norms of its diagonal blocks.
        """
        result = {str(layer): 0.0 for layer in self.layers}
        measured: Adapter = (looked.scores or {})["global"]
        for name, squares in measured.items():
            A, B = squares.A.double(), squares.B.double()
            found = A.sum() + B.sum()
            if self.options.choice == "groups":
                found = A.norm() + B.norm()
            layer = self.setting.sites[name].layer
            result[str(layer)] += float(found)
        return result
