"""Fed-HeLLo: clients that can afford different numbers of layers train different layers of one global LoRA.

Source: Zhang et al., "Fed-HeLLo: Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA Allocation",
arXiv 2506.12213. Everybody runs all layers and trains some; a layer's LoRA is averaged over those that trained it.
Which ones: by geometry (GD-HLA: the share of clients per layer rises with depth, ``inverted_triangle``; falls,
``triangle``; is high at both ends, ``bottleneck``; or ``uniform``), the same each round; in that shape but drawn again
each round (RGD-HLA, ``randomised``); or by Fisher information (FIM-HLA, ``allocation = "fim"``), after a warm start.

Where we differ: FIM-HLA scores layers on each client's own training data, once, after its first round beyond the warm
start (the paper: on the server's proxy data), and a client takes its best-scored layers; the warm start is the uniform
randomised allocation, and it counts in the budget. Affordable layers are shares dealt to the clients in turn
(``layers``). With ``layers = [1.0]`` this is FedIT.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Strict

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.algebra import Indices
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.methods import contract
from fedgrove.methods._layers import budgets, layers_of, mean_where_held, part, shaped_rows
from fedgrove.methods.contract import (
    ClientInfo,
    Method,
    Mine,
    Offer,
    Setting,
    State,
    Step,
    Trained,
    Update,
    shares,
)

Share = Annotated[float, Field(gt=0, le=1)]


class HeLLoOptions(contract.WeightedOptions):
    allocation: Literal["fim", "triangle", "inverted_triangle", "bottleneck", "uniform"] = Field(
        "fim",
        description="Which layers a client trains: those with the largest Fisher scores on its own data, or by a "
        "geometric shape of the clients per layer.",
    )
    randomised: bool = Field(
        False, description="Draw anew each round who trains which layer; the shape stays. Not for allocation = fim."
    )
    layers: Annotated[tuple[Share, ...], Strict(False), Field(min_length=1)] = Field(
        (0.25, 0.5, 0.75),
        description="Shares of the layers that a client can afford, dealt to the clients in name order, in turn.",
    )
    warm_rounds: int | None = Field(
        None,
        ge=1,
        description="Rounds of uniform randomised allocation before Fisher scores are measured. Not set: a fifth of "
        "run.rounds, at least one.",
        examples=[2],
    )
    batches: int = Field(8, ge=0, description="Batches that Fisher scores are measured on; 0: one pass over the data.")


class FedHeLLo(Method):
    name = "fed-hello"
    title = "Fed-HeLLo"
    paper = "arXiv 2506.12213"
    trains = "A, B of some layers"
    shares = "those layers"
    keeps = "Fisher scores"
    averages_factors = True
    Options: ClassVar[type[contract.Options]] = HeLLoOptions

    def __init__(self, options: Any, setting: Setting):
        super().__init__(options, setting)
        self.layers = layers_of(setting.sites)
        self.warm = options.warm_rounds or max(1, round(setting.rounds / 5))
        self._drawn: tuple[int, dict[str, list[int]]] | None = None  # a round's allocation: every client asks for it

    # ------------------------------------------------------------------ server
    def begin(self, clients: Sequence[ClientInfo]) -> State:
        counts = budgets([client.name for client in clients], self.options.layers, len(self.layers))
        return {"global": self.setting.shared_draw(), "counts": counts}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        offer: Offer = {"global": state["global"]}
        if round > self.setting.rounds or client.name not in state["counts"]:
            return offer
        if self.options.allocation == "fim" and round > self.warm:
            return {**offer, "count": state["counts"][client.name]}
        return {**offer, "layers": self._rows(state, round)[client.name]}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        adapters = [update.content["adapter"] for update in updates]
        return {**state, "global": mean_where_held(state["global"], adapters, self.weights(updates))}

    def reads(self) -> str:
        return "the Fisher scores that choose its layers" if self.options.allocation == "fim" else ""

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("global", state["global"]),))

    def modules(self, update: Update) -> tuple[Adapter, Indices | None]:
        return update.content["adapter"], None

    def weights(self, updates: Sequence[Update]) -> list[float]:
        return shares(updates, self.options.weights)

    def _rows(self, state: State, round: int) -> dict[str, list[int]]:
        if self._drawn is None or self._drawn[0] != round:
            fim = self.options.allocation == "fim"
            shape = "uniform" if fim else self.options.allocation
            rng = self.setting.rng(round, "allocation") if fim or self.options.randomised else None
            counts: dict[str, int] = state["counts"]
            rows = shaped_rows(shape, list(counts.values()), len(self.layers), rng)
            named = {name: [self.layers[n] for n in row] for name, row in zip(counts, rows, strict=True)}
            self._drawn = (round, named)
        return self._drawn[1]

    # ------------------------------------------------------------------ client
    def plan(self, client: ClientInfo, offer: Offer, mine: Mine, round: int) -> Generator[Step, Trained, None]:
        scores = mine.get("scores")
        if "layers" not in offer and scores is None:
            # Under a name of its own, so that what trains next does not take over all layers from it.
            probe = Assembly((Term("probe", offer["global"]),))
            looked = yield Step(probe, head=False, measure="fisher", stream="fisher", count=self.options.batches)
            scores = self._scores(looked)
        chosen = self._chosen(offer, scores)
        sites = self.setting.sites
        terms = [Term("trained", part(offer["global"], sites, chosen))]
        if len(chosen) < len(self.layers):
            terms.append(Term("frozen", part(offer["global"], sites, chosen, inside=False), train=""))
        yield Step(Assembly(tuple(terms)))

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        if trained[0].scores is not None:
            mine = {**mine, "scores": self._scores(trained[0])}
        return {"adapter": trained[-1].adapter("trained")}, mine

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("global", offer["global"]),))

    def _chosen(self, offer: Offer, scores: Mapping[str, float] | None) -> list[int]:
        """The layers to train: as the server allots them, or the best by the client's own scores (ties: shallower)."""
        if scores is None or "layers" in offer:
            allotted: list[int] = offer["layers"]
            return allotted
        ranked = sorted(self.layers, key=lambda layer: -scores[str(layer)])
        return sorted(ranked[: offer["count"]])

    def _scores(self, looked: Trained) -> dict[str, float]:
        """The trace of the empirical Fisher matrix of each layer's A and B."""
        result = {str(layer): 0.0 for layer in self.layers}
        for name, squares in (looked.scores or {})["probe"].items():
            total = float(squares.A.double().sum() + squares.B.double().sum())
            result[str(self.setting.sites[name].layer)] += total
        return result
