"""Fed-HeLLo: clients that can afford different numbers of layers train different layers of one
global LoRA.

Source: Zhang et al., "Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with
Heterogeneous LoRA Allocation", arXiv 2506.12213. Everybody runs all layers and trains some; a
layer's LoRA is averaged over those that trained it. Which ones: by geometry (GD-HLA: the share of
clients per layer rises with depth, ``inverted_triangle``; falls,
``triangle``; is high at both ends, ``bottleneck``; or ``uniform``), the same each round; in that
shape but drawn again each round (RGD-HLA, ``randomised``); or by Fisher information (FIM-HLA,
``allocation = "fim"``), after a warm start.

Where we differ: FIM-HLA scores layers on each client's own training data, once, after its first
round beyond the warm start (the paper: on the server's proxy data), and a client takes its
best-scored layers; the warm start is the uniform randomised allocation, and it counts in the
budget. Affordable layers are shares dealt to the clients in turn (``layers``). With ``layers =
[1.0]`` this is FedIT.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods._layers import part, shaped_rows
from fedgrove.methods._some_layers import LayerOptions, SomeLayers
from fedgrove.methods.contract import ClientInfo, Mine, Offer, Setting, State, Step, Trained


class HeLLoOptions(LayerOptions):
    allocation: Literal["fim", "triangle", "inverted_triangle", "bottleneck", "uniform"] = Field(
        "fim",
        description="Which layers a client trains: those with the largest Fisher scores on its own "
        "data, or by a "
        "geometric shape of the clients per layer.",
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


class FedHeLLo(SomeLayers):
    name = "fed-hello"
    title = "Fed-HeLLo"
    paper = "arXiv 2506.12213"
    trains = "A, B of some layers"
    shares = "those layers"
    keeps = "Fisher scores"
    Options: ClassVar[type[contract.Options]] = HeLLoOptions

    def __init__(self, options: Any, setting: Setting):
        super().__init__(options, setting)
        self.warm = options.warm_rounds or max(1, round(setting.rounds / 5))

    # ------------------------------------------------------------------ server
    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        offer: Offer = {"global": state["global"]}
        if client.name not in state["rows"]:  # a newcomer
            return offer
        if self.options.allocation == "fim" and round > self.warm:
            return {**offer, "count": state["counts"][client.name]}
        return {**offer, "layers": state["rows"][client.name]}

    def reads(self) -> str:
        return (
            "the Fisher scores that choose its layers" if self.options.allocation == "fim" else ""
        )

    def draw(self, counts: Sequence[int], round: int) -> list[list[int]]:
        fim = self.options.allocation == "fim"
        shape = "uniform" if fim else self.options.allocation
        rng = self.setting.rng(round, "allocation") if fim or self.options.randomised else None
        return shaped_rows(shape, counts, len(self.layers), rng)

    # ------------------------------------------------------------------ client
    def plan(
        self, client: ClientInfo, offer: Offer, mine: Mine, round: int
    ) -> Generator[Step, Trained, None]:
        scores = mine.get("scores")
        if "layers" not in offer and scores is None:
            probe = Assembly((Term("global", offer["global"]),))
            looked = yield Step(
                probe, head=False, measure="fisher", stream="fisher", count=self.options.batches
            )
            scores = self._scores(looked)
        chosen = self._chosen(offer, scores)
        sites = self.setting.sites
        terms = [Term("global", part(offer["global"], sites, chosen))]
        if len(chosen) < len(self.layers):
            terms.append(
                Term("frozen", part(offer["global"], sites, chosen, inside=False), train="")
            )
        yield Step(Assembly(tuple(terms)))

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        if trained[0].scores is not None:
            mine = {**mine, "scores": self._scores(trained[0])}
        return {"adapter": trained[-1].adapter("global")}, mine

    def _chosen(self, offer: Offer, scores: Mapping[str, float] | None) -> list[int]:
        """The layers to train: as the server allots them, or the best by the client's own scores
        (ties: shallower).
        """
        if scores is None or "layers" in offer:
            allotted: list[int] = offer["layers"]
            return allotted
        ranked = sorted(self.layers, key=lambda layer: -scores[str(layer)])
        return sorted(ranked[: offer["count"]])

    def _scores(self, looked: Trained) -> dict[str, float]:
        """The trace of the empirical Fisher matrix of each layer's A and B."""
        result = {str(layer): 0.0 for layer in self.layers}
        for name, squares in (looked.scores or {})["global"].items():
            total = float(squares.A.double().sum() + squares.B.double().sum())
            result[str(self.setting.sites[name].layer)] += total
        return result
