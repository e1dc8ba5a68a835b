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
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import Indices, index_mean, split
from fedgrove.adapters.assembly import Assembly, Term
from fedgrove.ground.errors import JobError
from fedgrove.methods import contract
from fedgrove.methods.contract import ClientInfo, Method, Mine, Offer, State, Step, Trained, Update
from fedgrove.methods.rule import Arrivals, Arrived, Needs, Outcome, Round, ServerRule, combine

ALL = ""  # the one place of a draw that serves all sites


class PLoRAOptions(contract.Options):
    """Fed-PLoRA's keys."""

    selection: Literal["random", "magnitude", "gradient", "least_trained"] = Field(
        "random",
        description="Which modules a client trains in a round: a uniform draw, those with the "
        "largest update, those "
        "with the largest gradient on its own data, or those that it trained least often; ties are "
        "drawn.",
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


class FedPLoRA(Method):
    name = "fed-plora"
    title = "Fed-PLoRA"
    paper = "arXiv 2602.16936"
    trains = "r_i of R modules"
    shares = "those modules"
    keeps = "nothing"
    ranks = "mixed"
    averages_factors = True
    Options: ClassVar[type[contract.Options]] = PLoRAOptions
    Rule: ClassVar[type[ServerRule]] = MeanOfModules

    # ------------------------------------------------------------------ server
    def check(self, clients: Sequence[ClientInfo]) -> None:
        setting = self.setting
        for client in clients:
            if setting.scaling == "client" and client.rank != setting.rank:
                raise JobError(
                    f'lora.scaling = "client" gives {client.name} the scale alpha / {client.rank}, '
                    f"but Fed-PLoRA needs "
                    f"alpha / {setting.rank} for every module of every client; set lora.scaling = "
                    f'"global".'
                )

    def begin(self, clients: Sequence[ClientInfo]) -> State:
        return {"global": self.setting.shared_draw()}

    def offer(self, state: State, round: int, client: ClientInfo) -> Offer:
        return {"global": state["global"]}

    def aggregate(self, state: State, round: int, updates: Sequence[Update]) -> State:
        arrivals = Arrivals(
            self.setting,
            [update.content["modules"] for update in updates],
            [1.0] * len(updates),  # over each index's holders: an exact 1 / count
            previous=state["global"],
            indices=[update.content["indices"] for update in updates],
        )
        rule = self.Rule(self.options, Round(self.setting.sites, round))
        return {"global": combine(rule, arrivals).whole}

    def needs_each(self) -> str:
        # "magnitude" and "random" are known to the server without being told; the others depend on
        # what stays
        if self.options.selection in ("random", "magnitude"):
            return ""
        return f'with method.selection = "{self.options.selection}" only the client knows which modules it trained'

    def addend(self, content: dict[str, Any], offer: Offer) -> dict[str, Any]:
        return {
            "modules": self._spread(content, offer["global"]),
            "indices": list(range(self.setting.rank)),
        }

    def divisors(self, contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How many clients drew each index; 1 where nobody did, whose sum is 0."""
        modules = contents[0]["modules"].items()
        R = self.setting.rank
        total = {
            site: Factors(f.A.new_zeros(R, f.A.shape[1]), f.B.new_zeros(f.B.shape[0], R), f.scale)
            for site, f in modules
        }
        for content in contents:
            ones = {site: f.map(torch.ones_like) for site, f in content["modules"].items()}
            held = self._spread(
                {**content, "modules": ones}, {s: f.map(torch.zeros_like) for s, f in total.items()}
            )
            total = {
                site: Factors(f.A + held[site].A, f.B + held[site].B, f.scale)
                for site, f in total.items()
            }
        return {
            "modules": {site: f.map(lambda count: count.clamp_min(1)) for site, f in total.items()}
        }

    def _spread(self, content: Mapping[str, Any], base: Adapter) -> Adapter:
        """All R modules: those of the content at their places, the others those of ``base``."""
        whole: Adapter = {}
        for site, f in content["modules"].items():
            chosen = content["indices"]
            rows = chosen[site] if isinstance(chosen, Mapping) else chosen
            A, B = base[site].A.clone(), base[site].B.clone()
            A[rows], B[:, rows] = f.A, f.B
            whole[site] = Factors(A, B, f.scale)
        return whole

    def reads(self) -> str:
        return (
            "the gradients that choose its modules" if self.options.selection == "gradient" else ""
        )

    def global_assembly(self, state: State) -> Assembly:
        return Assembly((Term("global", state["global"]),))

    def modules(self, update: Update) -> tuple[Adapter, Indices | None]:
        return update.content["modules"], update.content["indices"]

    # ------------------------------------------------------------------ client
    def plan(
        self, client: ClientInfo, offer: Offer, mine: Mine, round: int
    ) -> Generator[Step, Trained, None]:
        gradients = None
        if self.options.selection == "gradient" and client.rank < self.setting.rank:
            probe = Assembly((Term("global", offer["global"]),))
            looked = yield Step(
                probe, head=False, measure="fisher", stream="select", count=self.options.batches
            )
            gradients = looked.scores
        chosen = self._choose(client, offer, mine, round, gradients)
        yield Step(self._training(offer["global"], chosen))

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Offer, mine: Mine, round: int
    ) -> tuple[dict[str, Any], Mine]:
        chosen = self._choose(client, offer, mine, round, trained[0].scores)
        if self.options.selection == "least_trained":
            mine = {**mine, "counts": self._counted(mine, chosen)}
        return {"modules": trained[-1].adapter("selected"), "indices": chosen}, mine

    def personal(self, client: ClientInfo, offer: Offer, mine: Mine) -> Assembly:
        return Assembly((Term("global", offer["global"]),))

    def _training(self, adapter: Adapter, chosen: Indices) -> Assembly:
        """The chosen modules as one LoRA that trains, the others folded into the frozen base."""
        selected, others = split(adapter, chosen)
        terms = (Term("selected", selected),)
        if not any(factors.rank for factors in others.values()):
            return Assembly(terms)
        return (
            Assembly(terms, folded=others)
            if self.options.folding == "dense"
            else Assembly(terms, base_delta=others)
        )

    # --------------------------------------------------------------- selection
    def _choose(
        self,
        client: ClientInfo,
        offer: Offer,
        mine: Mine,
        round: int,
        gradients: Mapping[str, Adapter] | None,
    ) -> list[int] | dict[str, list[int]]:
        """The rank indices that the client trains in this round, ascending; by site with
        ``per_site``.
        """
        scores = self._scores(offer["global"], mine, gradients)
        chosen = {
            place: best(score, client.rank, self.setting.rng(round, client.name, "modules", place))
            for place, score in scores.items()
        }
        return chosen if self.options.per_site else chosen[ALL]

    def _scores(
        self, adapter: Adapter, mine: Mine, gradients: Mapping[str, Adapter] | None
    ) -> dict[str, Tensor]:
        """How much each of the R modules is wanted (float64 [R]), by site or for all sites at
        once.
        """
        selection = self.options.selection
        if selection == "least_trained":
            return {
                place: -torch.tensor(counts, dtype=torch.float64)
                for place, counts in self._counts(mine).items()
            }
        if selection == "magnitude":
            by_site = {
                site: _square(f.A, 1) * _square(f.B, 0) * f.scale**2 for site, f in adapter.items()
            }
        elif (
            selection == "gradient" and gradients is not None
        ):  # of squared gradients the mean is there already
            by_site = {
                s: f.A.double().sum(1) + f.B.double().sum(0) for s, f in gradients["global"].items()
            }
        else:
            by_site = {
                site: torch.zeros(f.rank, dtype=torch.float64) for site, f in adapter.items()
            }
        return (
            by_site if self.options.per_site else {ALL: torch.stack(list(by_site.values())).sum(0)}
        )

    def _counts(self, mine: Mine) -> dict[str, list[int]]:
        """How often this client trained each module."""
        places = list(self.setting.sites) if self.options.per_site else [ALL]
        counts: dict[str, list[int]] = mine.get("counts") or {
            place: [0] * self.setting.rank for place in places
        }
        return counts

    def _counted(self, mine: Mine, chosen: Indices) -> dict[str, list[int]]:
        at = chosen if isinstance(chosen, Mapping) else {ALL: chosen}
        return {
            place: [count + (index in at[place]) for index, count in enumerate(counts)]
            for place, counts in self._counts(mine).items()
        }


def best(score: Tensor, count: int, rng: torch.Generator) -> list[int]:
    """The indices of the ``count`` largest scores, ascending; among equal scores a uniform draw."""
    shuffled = torch.randperm(len(score), generator=rng)
    order = torch.argsort(score[shuffled], descending=True, stable=True)
    return sorted(shuffled[order[:count]].tolist())


def _square(factor: Tensor, dim: int) -> Tensor:
    """Squared length of each row (``dim`` 1) or column (0), in float64."""
    return factor.double().square().sum(dim)
