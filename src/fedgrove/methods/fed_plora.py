"""Fed-PLoRA: LoRA as R parallel rank-1 modules; a client trains as many as it can afford and folds
the rest.

Source: Zhang et al., "Fed-PLoRA", arXiv 2602.16936, ICLR 2026: select-N-fold and the mean per rank
index. Everybody gets all R modules. Each round a client draws its ``r_i`` without replacement, adds
the others to its frozen base, trains the drawn ones from their global values as one dense LoRA of
rank ``r_i``, and sends them up tagged by index. Each index becomes the uniform mean over the
clients that trained it; one that nobody trained keeps its value. With
``r_i = R`` for all it is FedIT with uniform weights, bit for bit.

Where we differ: the unselected modules run as a frozen low-rank side path unless ``folding =
"dense"``, which writes them into a copy of the weights as the paper does; both give the same
output, and the side path stays exact where the base is held in low precision. ``per_site`` and the
selections other than "random" are ours (named as future work). Local fine-tuning after the last
round trains all R modules, because it trains the personal model.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import Indices, index_mean, split
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.ground.errors import JobError
from fedgrove.methods import contract
from fedgrove.methods.contract import ClientInfo, Method, Setting, Step, Trained, Update
from fedgrove.methods.records import Whole
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine

ALL = ""  # the one place of a draw that serves all sites


class PLoRAOptions(contract.Options):
    """Fed-PLoRA's keys."""

    selection: Literal["random", "magnitude", "gradient", "least_trained"] = Field(
        "random",
        description="Which modules a client trains in a round: a uniform draw, those with the "
        "largest update, those with the largest gradient on its own data, or those that it trained "
        "least often; ties are drawn.",
    )
    per_site: bool = Field(
        False,
        description="Select for each adapted layer by itself instead of once for all of them.",
    )
    folding: Literal["side", "dense"] = Field(
        "side",
        description="How the other modules run: as a frozen low-rank path beside the base, or "
        "added to its weights.",
    )
    batches: int = Field(
        4,
        ge=0,
        description='Batches that selection = "gradient" looks at before each round; 0: one pass '
        "over the data.",
    )


@dataclass
class MeanOfModules:
    """The mean of each rank index over the clients that trained it; the others stay, or are zero."""

    options: PLoRAOptions
    round: Round
    needs: ClassVar[Needs] = Needs(equal_scales=True, previous=True, by_index="tagged")

    def site(self, given: Arrived) -> Outcome:
        old = {given.name: given.old(given.rank)}
        made = index_mean(given.adapters, given.indices, old, given.weights)
        return Outcome(whole=made[given.name])


@dataclass(frozen=True, eq=False)
class Modules:
    """The modules that a client trained, ascending, and their indices among all R (by site with
    ``per_site``).
    """

    modules: Adapter
    indices: Indices


@dataclass(frozen=True, eq=False)
class Counts:
    """How often the client trained each of the R modules, by site or for all at once; empty before
    it has trained, and with the selections that do not ask.
    """

    counts: dict[str, list[int]] = field(default_factory=dict)


class FedPLoRA(Method):
    name = "fed-plora"
    title = "Fed-PLoRA"
    paper = "arXiv 2602.16936"
    trains = "r_i of R modules"
    shares = "those modules"
    keeps = "nothing"
    ranks = "mixed"
    averages_factors = True
    centres = "values"
    State, Offer, Mine, Sent = Whole, Whole, Counts, Modules
    Options: ClassVar[type[contract.Options]] = PLoRAOptions
    Rule: ClassVar[type[ServerRule]] = MeanOfModules

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        refuse_scales(clients, self.setting, "Fed-PLoRA")

    def begin(self, clients: Sequence[ClientInfo]) -> Whole:
        return Whole(self.setting.shared_draw())

    def offer(
        self,
        state: Whole,
        round: int,
        client: ClientInfo,
    ) -> Whole:
        return state

    def aggregate(
        self,
        state: Whole,
        round: int,
        updates: Sequence[Update[Modules]],
    ) -> Whole:
        arrivals = Arrivals(
            self.setting,
            [update.content.modules for update in updates],
            [1.0] * len(updates),  # over each index's holders: an exact 1 / count
            previous=state.whole,
            indices=[update.content.indices for update in updates],
        )
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        return Whole(combine(rule, arrivals).whole)

    def unmeasured(self) -> str:
        return self.needs_each()

    def needs_each(self) -> str:
        # The server knows what "random" and "magnitude" choose without being told; the others
        # depend on what stays.
        selection = self.options.selection
        if selection in ("random", "magnitude"):
            return ""
        return (
            f'with method.selection = "{selection}" only the client knows which modules it trained'
        )

    def addend(self, content: Modules, offer: Whole) -> Modules:
        return Modules(_spread(content, offer.whole), list(range(self.setting.rank)))

    def divisors(self, contents: Sequence[Modules]) -> dict[str, Adapter]:
        """How many clients drew each index; 1 where nobody did, whose sum is 0."""
        nothing: Adapter = {}
        for site, factors in contents[0].modules.items():
            nothing[site] = factors.zeros(self.setting.rank, factors.scale)
        drawn = dict(nothing)
        for content in contents:
            ones: Adapter = {}
            for site, factors in content.modules.items():
                ones[site] = factors.map(torch.ones_like)
            held = _spread(Modules(ones, content.indices), nothing)
            for site, more in held.items():
                factors = drawn[site]
                A = factors.A + more.A
                B = factors.B + more.B
                drawn[site] = Factors(A, B, factors.scale)
        least: Adapter = {}
        for site, factors in drawn.items():
            least[site] = factors.map(_one_or_more)
        return {"modules": least}

    def reads(self) -> str:
        if self.options.selection == "gradient":
            return "the gradients that choose its modules"
        return ""

    def global_assembly(self, state: Whole) -> Assembly:
        return Assembly((Term("global", state.whole),))

    def modules(self, update: Update[Modules]) -> tuple[Adapter, Indices | None]:
        return update.content.modules, update.content.indices

    # ------------------------------------------------------------------ client
    def plan(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Counts,
        round: int,
    ) -> Generator[Step, Trained, None]:
        gradients = None
        if self.options.selection == "gradient" and client.rank < self.setting.rank:
            probe = Assembly((Term("global", offer.whole),))
            looked = yield Step(
                probe, head=False, measure="fisher", stream="select", count=self.options.batches
            )
            gradients = looked.scores
        chosen = self._choose(
            client,
            offer,
            mine,
            round,
            gradients,
        )
        yield Step(self._training(offer.whole, chosen))

    def report(
        self,
        client: ClientInfo,
        trained: Sequence[Trained],
        offer: Whole,
        mine: Counts,
        round: int,
    ) -> tuple[Modules, Counts]:
        chosen = self._choose(
            client,
            offer,
            mine,
            round,
            trained[0].scores,
        )
        if self.options.selection == "least_trained":
            mine = self._counted(mine, chosen)
        return Modules(trained[-1].adapter("selected"), chosen), mine

    def personal(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Counts,
    ) -> Assembly:
        return Assembly((Term("global", offer.whole),))

    def _training(self, adapter: Adapter, chosen: Indices) -> Assembly:
        return training(adapter, chosen, dense=self.options.folding == "dense")

    # --------------------------------------------------------------- selection
    def _choose(
        self,
        client: ClientInfo,
        offer: Whole,
        mine: Counts,
        round: int,
        gradients: Mapping[str, Adapter] | None,
    ) -> list[int] | dict[str, list[int]]:
        """The rank indices that the client trains in this round, ascending; by site with
        ``per_site``.
        """
        chosen: dict[str, list[int]] = {}
        for place, score in self._scores(offer.whole, mine, gradients).items():
            rng = self.setting.rng(round, client.name, "modules", place)
            chosen[place] = best(score, client.rank, rng)
        if self.options.per_site:
            return chosen
        return chosen[ALL]

    def _scores(
        self,
        adapter: Adapter,
        mine: Counts,
        gradients: Mapping[str, Adapter] | None,
    ) -> dict[str, Tensor]:
        """How much each of the R modules is wanted (float64 [R]), by site or for all sites at
        once.
        """
        selection = self.options.selection
        if selection == "least_trained":
            return self._least_trained(mine)
        by_site: dict[str, Tensor] = {}
        for site, factors in adapter.items():
            if selection == "magnitude":
                by_site[site] = magnitudes(factors)
            elif selection == "gradient" and gradients is not None:
                by_site[site] = wanted(gradients["global"][site])
            else:
                by_site[site] = torch.zeros(factors.rank, dtype=torch.float64)
        if self.options.per_site:
            return by_site
        return {ALL: torch.stack(list(by_site.values())).sum(0)}

    def _least_trained(self, mine: Counts) -> dict[str, Tensor]:
        """Less the more often this client trained a module: float64 [R], by place."""
        scores: dict[str, Tensor] = {}
        for place, counts in self._counts(mine).items():
            scores[place] = -torch.tensor(counts, dtype=torch.float64)
        return scores

    def _counts(self, mine: Counts) -> dict[str, list[int]]:
        """How often this client trained each module, by place."""
        if mine.counts:
            return mine.counts
        places = [ALL]
        if self.options.per_site:
            places = list(self.setting.sites)
        return {place: [0] * self.setting.rank for place in places}

    def _counted(self, mine: Counts, chosen: Indices) -> Counts:
        """The counts after one more training."""
        counts: dict[str, list[int]] = {}
        for place, before in self._counts(mine).items():
            if isinstance(chosen, Mapping):
                trained = chosen[place]
            else:
                trained = chosen
            counts[place] = [count + (index in trained) for index, count in enumerate(before)]
        return Counts(counts)


def _one_or_more(counts: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    return counts.clamp_min(1)


def _spread(content: Modules, base: Adapter) -> Adapter:
    """All R modules: those of the content at their places, the others those of ``base``."""
    whole: Adapter = {}
    for site, factors in content.modules.items():
        chosen = content.indices
        if isinstance(chosen, Mapping):
            chosen = chosen[site]
        rows = list(chosen)
        A = base[site].A.clone()
        B = base[site].B.clone()
        A[rows] = factors.A
        B[:, rows] = factors.B
        whole[site] = Factors(A, B, factors.scale)
    return whole


def refuse_scales(
    clients: Sequence[ClientInfo],
    setting: Setting,
    method: str,
) -> None:
    """Refuse, with a ``JobError``, clients whose modules would not have the one scale alpha / R."""
    for client in clients:
        if setting.scaling == "client" and client.rank != setting.rank:
            raise JobError(
                f'lora.scaling = "client" gives {client.name} the scale alpha / {client.rank}, '
                f"but {method} needs alpha / {setting.rank} for every module of every "
                'client; set lora.scaling = "global".'
            )


def training(
    adapter: Adapter,
    chosen: Indices,
    *,
    dense: bool = False,
) -> Assembly:
    """The chosen modules as one LoRA that trains, the others folded into the frozen base."""
    selected, others = split(adapter, chosen)
    terms = (Term("selected", selected),)
    if not any(factors.rank for factors in others.values()):
        return Assembly(terms)
    if dense:
        return Assembly(terms, folded=others)
    return Assembly(terms, base_delta=others)


def best(
    score: Tensor,
    count: int,
    rng: torch.Generator,
) -> list[int]:
    """The indices of the ``count`` largest of the scores [R], ascending; among equal scores a
    uniform draw.
    """
    shuffled = torch.randperm(len(score), generator=rng)
    order = torch.argsort(score[shuffled], descending=True, stable=True)
    return sorted(shuffled[order[:count]].tolist())


def wanted(squares: Factors) -> Tensor:
    """How much the loss would move each module: the sum of its mean squared gradients, float64
    [rank].
    """
    return squares.A.double().sum(1) + squares.B.double().sum(0)


def magnitudes(factors: Factors) -> Tensor:
    """The squared Frobenius norm of each module's update, float64 [rank]."""
    rows = factors.A.double().square().sum(1)
    columns = factors.B.double().square().sum(0)
    return rows * columns * factors.scale**2
