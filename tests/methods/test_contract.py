"""What the contract itself says: draws at any rank, what a step carries over, capabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.kit import adapter, info, method, same, setting, update
from tests.tiny import tiny_job
from torch import Tensor

from fedgrove.adapters.assembly import Assembly, Extra, Term
from fedgrove.ground.errors import RunError
from fedgrove.methods import protocols
from fedgrove.methods.contract import ClientInfo, Method, Options, Step, Trained, Update, reveal
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.records import Nothing, OneAdapter, Own, Whole
from fedgrove.methods.registry import register
from fedgrove.start import run
from fedgrove.training.client import carry


# ---------------------------------------------------------------------- draws
@given(
    rank=st.integers(1, 6), one=st.integers(1, 12), other=st.integers(1, 12), seed=st.integers(0, 9)
)
def test_a_shared_draw_has_the_rank_asked_for_and_ranks_agree_in_their_first_rows(
    rank: int, one: int, other: int, seed: int
) -> None:
    here = setting(rank=rank, seed=seed, scaling="client")
    small, large = here.shared_draw(min(one, other)), here.shared_draw(max(one, other))
    for site, factors in small.items():
        assert factors.A.shape == (min(one, other), here.sites[site].in_features)
        assert factors.B.shape == (here.sites[site].out_features, min(one, other))
        assert large[site].rank == max(one, other)
        assert torch.equal(large[site].A[: factors.rank], factors.A)
        assert not large[site].B.any()
        assert factors.scale == here.scale(factors.rank)


def test_rows_beyond_the_global_rank_differ_by_site_purpose_and_seed() -> None:
    here, rank = setting(rank=2), 5
    rows = [value.A[2:] for value in here.shared_draw(rank).values()]
    rows += [value.A[2:] for value in here.shared_draw(rank, "other").values()]
    rows += [value.A[2:] for value in setting(rank=2, seed=4).shared_draw(rank).values()]
    first = [float(each[0, 0]) for each in rows]
    assert len(set(first)) == len(first)
    bound = max(site.in_features for site in here.sites.values()) ** -0.5
    assert all(float(each.abs().max()) <= 0.5 + bound for each in rows)
    assert all(bool(each.any(1).all()) for each in rows)


# --------------------------------------------------------------------- carries
def trained(step: Step, size: float) -> Trained:
    """The step with ``size`` added to all that trains."""
    terms = []
    for term in step.assembly.terms:
        moved = {site: f.map(lambda value: value + size) for site, f in term.adapter.items()}
        terms.append(Term(term.name, moved if term.train else term.adapter, term.train))
    extras = {
        name: Extra(extra.value + size if extra.train else extra.value, extra.train)
        for name, extra in step.assembly.extras.items()
    }
    return Trained(Assembly(tuple(terms), extras=extras), 0.0, 1)


def both(extras: dict[str, Extra] | None = None, own: str = "AB") -> Assembly:
    terms = Term("own", adapter(1), own), Term("global", adapter(2), "")
    return Assembly(terms, extras=extras or {})


def test_a_step_carries_over_what_it_names_and_nothing_else() -> None:
    gate = {"gate": Extra(torch.zeros(2))}
    first = Step(both({**gate, "frozen": Extra(torch.zeros(2), train=False)}))
    done = [trained(first, 1.0)]
    plain = carry(Step(both(gate)), done)
    assert same(plain.assembly.adapter("own"), adapter(1))
    assert not plain.assembly.extras["gate"].value.any()
    named = carry(Step(both(gate, own=""), carries=("own", "gate")), done)
    assert same(named.assembly.adapter("own"), done[0].adapter("own"))
    assert named.assembly.term("own").train == ""  # the step's own word
    assert named.assembly.extras["gate"].value.tolist() == [1.0, 1.0]
    assert same(named.assembly.adapter("global"), adapter(2))


def test_the_newest_value_is_carried_and_the_head_always_is() -> None:
    head = {"head.bias": Extra(torch.zeros(2))}
    done = [trained(Step(both(head)), 1.0)]
    again = carry(Step(both(head), carries=("own",)), done)
    done.append(trained(again, 2.0))
    last = carry(Step(both(head), carries=("own",)), done)
    assert same(last.assembly.adapter("own"), done[1].adapter("own"))
    assert last.assembly.extras["head.bias"].value.tolist() == [3.0, 3.0]


def test_what_cannot_be_carried_is_refused() -> None:
    done = [trained(Step(both()), 1.0)]
    with pytest.raises(RunError, match="carries over 'twig', that it does not have"):
        carry(Step(both(), carries=("twig",)), done)
    with pytest.raises(RunError, match="carries over 'global', that no step before it trained"):
        carry(Step(both(), carries=("global",)), done)
    with pytest.raises(RunError, match="carries over 'own', that no step before it trained"):
        carry(Step(both(), carries=("own",)), [])


# ---------------------------------------------------------------- capabilities
def test_a_method_without_a_capability_is_asked_nothing() -> None:
    class Bare(Method):
        pass

    bare = Bare(Options(), setting())
    assert protocols.needs_each(bare) == protocols.EACH
    assert protocols.reads(bare) == ""
    assert protocols.global_assembly(bare, {}) is None
    assert not protocols.tiers(bare)
    assert not protocols.mixes(Bare)
    assert not protocols.averages_factors(bare)
    assert protocols.weights(bare, [update("a", 1), update("b", 3)]) == [0.5, 0.5]
    assert protocols.placed({}) == protocols.placed(Nothing()) == ""
    kinds = (protocols.Summable, protocols.Probes, protocols.Penalised, protocols.ServerArtefacts)
    assert not any(isinstance(bare, kind) for kind in kinds)


def test_capabilities_may_depend_on_options() -> None:
    assert protocols.needs_each(method("fed-plora")) == ""
    assert "only the client knows" in protocols.needs_each(
        method("fed-plora", selection="gradient")
    )
    assert protocols.reads(method("fed-hello", allocation="fim"))
    assert not protocols.reads(method("fed-hello", allocation="uniform"))
    assert protocols.averages_factors(method("fedit"))
    assert not protocols.averages_factors(method("fedrot-lora"))  # which is a FedIT otherwise
    assert protocols.weights(method("fedit"), [update("a", 1), update("b", 3)]) == [0.25, 0.75]

    class Deep(FedIT):
        @property
        def tiers(self) -> Sequence[str]:
            return [f"tier {number}" for number in range(self.setting.rank)]

    assert protocols.tiers(Deep(FedIT.Options(), setting(rank=2))) == ["tier 0", "tier 1"]


# ------------------------------------------------------------------- in a run
class Counting(FedIT):
    """FedIT that counts what it is asked."""

    name, title = "counting", "Counting"
    Mine = Own
    opened: ClassVar[list[int]] = []
    met: ClassVar[set[tuple[str, type]]] = set()
    ranks_seen: ClassVar[set[int]] = set()

    def open(self, state: Whole, round: int) -> Whole:
        self.met.add(("state", type(state)))
        self.opened.append(round)
        return state

    def aggregate(self, state: Whole, round: int, updates: Sequence[Update[OneAdapter]]) -> Whole:
        self.met.update(("content", type(each.content)) for each in updates)
        self.ranks_seen.update(each.rank for each in updates)
        return super().aggregate(state, round, updates)

    def report(
        self, client: ClientInfo, trained: Sequence[Trained], offer: Whole, mine: Own, round: int
    ) -> tuple[OneAdapter, Own]:
        self.met.update({("offer", type(offer)), ("mine", type(mine))})
        adapter = trained[-1].adapter("global")
        return OneAdapter(adapter), Own(adapter)


@pytest.mark.parametrize("compress", ["none", "fp16"])
def test_every_half_meets_its_own_kinds_and_the_state_is_opened_once_a_round(
    compress: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    from fedgrove.methods import registry

    register(Counting)
    Counting.opened.clear()
    Counting.met.clear()
    Counting.ranks_seen.clear()
    try:
        job = tiny_job(
            tiny_bert,
            silos,
            method={"name": "counting"},
            run={"rounds": 2, "compress": compress},
            federation={"held_out": ["site-2"]},
        )
        run(job, tmp_path / "out")
    finally:
        registry.METHODS.forget()
    assert Counting.met == {
        ("state", Whole),
        ("content", OneAdapter),
        ("offer", Whole),
        ("mine", Own),
    }
    assert Counting.opened == [1, 2, 3]
    assert Counting.ranks_seen == {job.lora.rank}


def test_reveal_keeps_the_kind() -> None:
    found = reveal(Own({"q": adapter(1)["layer.0.query"]}))
    assert isinstance(found, Own)
    empty: dict[str, Tensor] = {}
    assert reveal(empty) == {}


def test_a_default_plan_is_one_step_on_the_personal_model() -> None:
    ours: Any = method("fedit")
    (step,) = ours.plan(info("a"), Whole(adapter(1)), {}, 1)
    assert same(step.assembly.adapter("global"), adapter(1))
    assert step.penalty is None
