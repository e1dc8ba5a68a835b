"""HETLoRA: zero-padded mean by norms, the tail's penalty, self-pruning, scales, and FedIT as its
special case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import aggregated, fedit_mean
from tests.methods.rules import (
    CLIENTS,
    ONE,
    SITES,
    WEIGHTS,
    check_run,
    client_draws,
    close,
    dense,
    draw,
    lines,
    method,
    sent,
    small_job,
)

from fedgrove.adapters import Adapter, Assembly, Factors, Term
from fedgrove.ground.errors import JobError
from fedgrove.methods.contract import ClientInfo, Live, Trained, Update
from fedgrove.methods.hetlora import WholeAndRanks
from fedgrove.methods.records import OneAdapter, Whole


def norms(adapters: list[Adapter]) -> list[float]:
    """``||B_i A_i||`` over all sites, as shares."""
    found = [
        sum(float(dense([a], [1.0], site).norm() ** 2) for site in SITES) ** 0.5 for a in adapters
    ]
    return [value / sum(found) for value in found]


@pytest.mark.parametrize("variant", ["full", "reduced"])
@pytest.mark.parametrize("scaling", ["global", "client"])
@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_padded_factors_are_averaged(variant: str, scaling: Any, stretch: float) -> None:
    chosen = method(
        "hetlora", scaling, variant=variant, rescale="B" if scaling == "client" else None
    )
    chosen.check(CLIENTS)
    adapters = client_draws(chosen, stretch)
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters))
    parts = norms(adapters) if variant == "full" else WEIGHTS
    for site, place in SITES.items():
        a, b = (
            torch.zeros(4, place.in_features).double(),
            torch.zeros(place.out_features, 4).double(),
        )
        for adapter, weight in zip(adapters, parts, strict=True):
            f = adapter[site]
            a[: f.rank] += weight * f.A
            b[:, : f.rank] += weight * f.B * f.scale / 1.25
        close(state.whole[site].A, a)
        close(state.whole[site].B, b)
        assert state.whole[site].scale == 1.25
        for client in CLIENTS:
            f = chosen.offer(state, 2, client).whole[site]
            assert f.scale == chosen.setting.scale(client.rank)
            close(f.product(), 1.25 * b[:, : client.rank] @ a[: client.rank])


def test_unequal_scales_are_refused() -> None:
    method("hetlora").check(CLIENTS)
    with pytest.raises(JobError, match=r'method\.rescale = "B"'):
        method("hetlora", "client").check(CLIENTS)


def test_with_equal_ranks_and_norms_it_is_fedit() -> None:
    chosen = method("hetlora")
    adapters = [draw(n, 4) for n in range(4)]
    size = [sum(float(f.product().norm() ** 2) for f in a.values()) ** 0.5 for a in adapters]
    even = [
        {s: Factors(f.A, f.B / size[n], f.scale) for s, f in a.items()}
        for n, a in enumerate(adapters)
    ]
    plain = fedit_mean(sent(even), "uniform")
    after = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(even)).whole
    for site in SITES:
        close(after[site].A, plain[site].A)
        close(after[site].B, plain[site].B)


def test_a_module_that_nobody_held_keeps_its_value() -> None:
    chosen = method("hetlora")
    state = chosen.begin(CLIENTS)
    after = aggregated(chosen, state, 1, sent(client_draws(chosen, ranks=(2,))))
    for site, f in after.whole.items():
        assert torch.equal(f.A[2:], state.whole[site].A[2:].double())
        assert f.A[2:].any()
    nothing = [{s: f.map(torch.zeros_like) for s, f in draw(1, 2).items()}] * 2
    assert chosen.weights([Update("c", 1, OneAdapter(each)) for each in nothing]) == [0.5, 0.5]


def test_the_penalty_is_on_the_tail_alone() -> None:
    chosen, adapter = method("hetlora", gamma=0.6, lam=0.3), draw(7, 4)
    leaves = {s: f.map(lambda x: x.clone().requires_grad_()) for s, f in adapter.items()}
    penalty = chosen.tail_penalty(4)
    value = penalty(Live({"global": leaves}, {}))
    want = sum(
        0.3 * float(f.B[:, 2:].norm() * f.A[2:].norm()) for f in adapter.values()
    )  # floor(0.6 * 4) = 2
    assert float(value.detach()) == pytest.approx(want, rel=1e-12)
    value.backward()
    for f in leaves.values():
        assert f.A.grad is not None
        assert f.A.grad[2:].all()
        assert not f.A.grad[:2].any()
    start = {
        s: f.map(lambda x: x.clone().requires_grad_())
        for s, f in chosen.setting.shared_draw().items()
    }
    penalty(Live({"global": start}, {})).backward()  # B = 0
    assert all(
        bool(torch.isfinite(x.grad).all())
        for f in start.values()
        for x in (f.A, f.B)
        if x.grad is not None
    )
    assert method("hetlora", variant="reduced").tail_penalty(4) is None
    assert method("hetlora", lam=0.0).tail_penalty(4) is None
    assert method("hetlora").tail_penalty(1) is None
    (step,) = chosen.plan(CLIENTS[1], Whole(adapter), {}, 1)
    assert step.penalty is not None


def test_the_rank_that_survives() -> None:
    assert [method("hetlora").kept(r) for r in (1, 2, 4, 8, 100)] == [1, 1, 3, 7, 99]
    assert [method("hetlora", gamma=0.5, r_min=3).kept(r) for r in (2, 3, 4, 8)] == [2, 3, 3, 4]
    assert method("hetlora", gamma=0.7).kept(10) == 7


def test_a_tail_that_shrank_is_pruned_for_good() -> None:
    chosen, start = method("hetlora", gamma=0.6), draw(7, 4)
    client, state = CLIENTS[1], WholeAndRanks(start, {c.name: c.rank for c in CLIENTS})
    for factor, rank in ((0.9, 2), (1.1, 4)):
        end = {
            s: Factors(f.A, f.B * torch.tensor([1.0, 1.0, factor, factor]), f.scale)
            for s, f in start.items()
        }
        done = Trained(Assembly((Term("global", end),)), 0.0, 1)
        content, _ = chosen.report(client, [done], chosen.offer(state, 2, client), {}, 2)
        assert {f.rank for f in content.adapter.values()} == {rank}
        update = [type(u)("c1", u.examples, u.content) for u in sent([content.adapter])]
        after = aggregated(chosen, state, 2, update)
        assert after.ranks == {"c0": 2, "c1": rank, "c2": 1, "c3": 3}
        assert {f.rank for f in chosen.offer(after, 3, client).whole.values()} == {rank}
        reduced = method("hetlora", variant="reduced", gamma=0.6)
        whole, _ = reduced.report(client, [done], Whole(start), {}, 2)
        assert {f.rank for f in whole.adapter.values()} == {4}
    assert chosen.artefacts(after) == {"ranks.json": {"c0": 2, "c1": 4, "c2": 1, "c3": 3}}


def test_a_newcomer_gets_its_own_rank() -> None:
    chosen = method("hetlora")
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(client_draws(chosen)))
    assert chosen.welcome(state, ClientInfo("new", 3, 1), None).whole["q"].rank == 3


@pytest.mark.parametrize("variant", ["full", "reduced"])
def test_a_run(variant: str, tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    # A tail under so heavy a penalty shrinks as soon as it is there, which is from the second round
    # on.
    options = {"variant": variant, "lam": 50.0}
    job = small_job("hetlora", tiny_bert, silos, method=options, run={"rounds": 4})
    out = check_run(job, tmp_path)
    ranks = {"site-0": 2, "site-1": 4, "site-2": 3}
    for line in lines(out, "train"):
        down, up = line["bytes_down"] // (4 * ONE), line["bytes_up"] // (4 * ONE)
        assert down == ranks[line["client"]]
        assert up in ((down, max(1, down - 1)) if variant == "full" else (down,))
        ranks[line["client"]] = up
    assert json.loads((out / "ranks.json").read_text()) == ranks
    assert (sum(ranks.values()) < 9) == (variant == "full")
