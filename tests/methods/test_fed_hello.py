"""Fed-HeLLo (2506.12213): the shapes of its allocations, Fisher scores, means over those that
trained a layer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import (
    PER_RANK,
    SITES,
    adapter,
    aggregated,
    equal_runs,
    exports,
    info,
    method,
    near,
    offered,
    resumes,
    same,
    satisfies,
    sent,
    update,
)
from tests.tiny import tiny_job

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.ground.seeds import generator
from fedgrove.methods._layers import SHAPES, holders, part, score_groups, shaped_rows
from fedgrove.methods._some_layers import LayersState, SomeOfIt
from fedgrove.methods.contract import Trained
from fedgrove.methods.fed_hello import FedHeLLo, Scores
from fedgrove.start import run

FIM: dict[str, Any] = {"method": {"name": "fed-hello", "layers": [0.5]}, "run": {"rounds": 3}}


def columns(rows: list[list[int]], layers: int) -> list[int]:
    return [sum(layer in row for row in rows) for layer in range(layers)]


def test_the_shapes_of_the_clients_per_layer() -> None:
    assert holders("uniform", 12, 12, 6) == [2] * 6
    assert holders("triangle", 21, 12, 6) == [6, 5, 4, 3, 2, 1]
    assert holders("inverted_triangle", 21, 12, 6) == [1, 2, 3, 4, 5, 6]
    assert holders("bottleneck", 24, 12, 6) == [6, 4, 2, 2, 4, 6]
    assert holders("inverted_triangle", 3, 9, 4) == [
        0,
        1,
        1,
        1,
    ]  # fewer places than layers: the shape alone decides
    assert holders("triangle", 11, 3, 4) == [3, 3, 3, 2]  # a client trains a layer once


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("random", [False, True])
def test_everybody_trains_what_it_can_afford_and_each_layer_has_its_share(
    shape: str, random: bool
) -> None:
    counts, layers = [1, 2, 3, 1, 2, 3, 4, 2, 1, 5], 8
    for seed in range(10):
        rows = shaped_rows(shape, counts, layers, generator(seed) if random else None)
        assert [len(row) for row in rows] == counts
        assert all(row == sorted(set(row)) for row in rows)
        assert columns(rows, layers) == holders(shape, sum(counts), len(counts), layers)


def test_a_randomised_allocation_changes_from_round_to_round_and_a_geometric_one_does_not() -> None:
    clients = [info(f"c{n}") for n in range(6)]
    for randomised in (False, True):
        ours = method(
            "fed-hello", allocation="uniform", randomised=randomised, layers=(0.5,), rounds=30
        )
        state = ours.begin(clients)
        drawn = {str([offered(ours, state, r, c).layers for c in clients]) for r in range(1, 20)}
        assert (len(drawn) > 10) if randomised else (len(drawn) == 1)


def test_a_layer_becomes_the_mean_over_those_that_trained_it() -> None:
    ours = method("fed-hello")
    previous, rows = adapter(9), [[0, 1], [1], [1, 3]]
    held = [adapter(n, size=100.0**n) for n in range(3)]
    updates = [
        update(f"c{n}", 10 * (n + 1), adapter=part(held[n], SITES, rows[n])) for n in range(3)
    ]
    after: Adapter = aggregated(ours, LayersState(previous), 1, updates).whole
    near(part(after, SITES, [0]), part(held[0], SITES, [0]))
    assert same(part(after, SITES, [2]), part(previous, SITES, [2]))
    near(part(after, SITES, [3]), part(held[2], SITES, [3]))
    weights = torch.tensor([1 / 6, 2 / 6, 3 / 6], dtype=torch.float64)
    for name in part(after, SITES, [1]):
        torch.testing.assert_close(
            after[name].A,
            torch.einsum("n,nij->ij", weights, torch.stack([a[name].A for a in held])),
        )
        torch.testing.assert_close(
            after[name].B,
            torch.einsum("n,nij->ij", weights, torch.stack([a[name].B for a in held])),
        )


def squares(by_layer: dict[int, float]) -> Adapter:
    return {
        name: Factors(
            torch.full_like(f.A, by_layer[SITES[name].layer]), torch.zeros_like(f.B), f.scale
        )
        for name, f in adapter(0).items()
    }


def test_after_the_warm_start_a_client_trains_its_best_scored_layers() -> None:
    ours = method("fed-hello", layers=(0.5,), warm_rounds=2, batches=3)
    client = info("a")
    state = ours.begin([client])
    assert len(offered(ours, state, 2, client).layers or []) == 2
    offer = offered(ours, state, 3, client)
    assert offer.count == 2
    plan = ours.plan(client, offer, Scores(), 3)
    look = next(plan)
    assert (look.measure, look.count, look.head) == ("fisher", 3, False)
    looked = Trained(
        look.assembly, 0.0, 0, scores={"global": squares({0: 1.0, 1: 5.0, 2: 0.1, 3: 4.0})}
    )
    step = plan.send(looked)
    assert {SITES[name].layer for name in step.assembly.adapter("global")} == {1, 3}
    assert {SITES[name].layer for name in step.assembly.adapter("frozen")} == {0, 2}
    assert step.assembly.term("frozen").train == ""
    up, mine = ours.report(client, [looked, Trained(step.assembly, 0.1, 2)], offer, Scores(), 3)
    assert list(up.adapter) == list(part(offer.adapter, SITES, [1, 3]))
    (again,) = ours.plan(client, offer, mine, 4)  # measured once
    assert list(again.assembly.adapter("global")) == list(up.adapter)
    width = sum(f.A.numel() for name, f in adapter(0).items() if SITES[name].layer == 1)
    assert mine.scores["1"] == pytest.approx(5.0 * width)


def test_three_groups_of_scores_whatever_number_k_means_gives_them() -> None:
    assert score_groups([9.0, 0.1, 5.0, 0.2, 8.9, 5.1]) == [2, 0, 1, 0, 2, 1]
    assert score_groups([1.0, 4.0]) == [1, 2]
    assert score_groups([3.0, 3.0, 3.0]) == [2, 2, 2]


def test_by_groups_layers_are_drawn_anew_each_round_with_weights_1_2_3() -> None:
    ours = method("fed-hello", layers=(0.25,), warm_rounds=1, choice="groups", rounds=900)
    client = info("a")
    norms = Scores({"0": 9.0, "1": 0.1, "2": 5.0, "3": 0.2})  # weights 3, 1, 2, 1
    offer = offered(ours, ours.begin([client]), 2, client)
    counts = [0] * 4
    for round in range(2, 702):
        (step,) = ours.plan(client, offer, norms, round)
        (layer,) = {SITES[name].layer for name in step.assembly.adapter("global")}
        counts[layer] += 1
    for layer, weight in enumerate((3, 1, 2, 1)):
        assert counts[layer] == pytest.approx(100 * weight, abs=45)
    # a layer's score is the sum of the norms of its blocks
    look = next(ours.plan(client, offer, Scores(), 2))
    squared = squares({0: 1.0, 1: 5.0, 2: 0.1, 3: 4.0})
    looked = Trained(look.assembly, 0.0, 0, scores={"global": squared})
    _, mine = ours.report(client, [looked, looked], offer, Scores(), 2)
    blocks = [f.A.numel() for name, f in adapter(0).items() if SITES[name].layer == 1]
    assert mine.scores["1"] == pytest.approx(5.0 * sum(n**0.5 for n in blocks))


def test_uniform_with_all_layers_is_fedit(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    ours = {"name": "fed-hello", "allocation": "uniform", "layers": [1.0]}
    equal_runs(tiny_bert, silos, tmp_path, ours, {"name": "fedit"}, run={"rounds": 2})


def test_frozen_layers_still_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """Splitting the global adapter into what trains and what does not changes no logit."""
    opened = exports(tiny_bert, silos, tmp_path, **FIM)
    name = "site-0"
    whole = opened.assembly(name)
    offer = SomeOfIt(opened.state.whole, layers=[1])
    (step,) = opened.method.plan(opened.prepared.clients[name], offer, Scores(), 1)
    split = replace(step.assembly, extras=whole.extras)
    torch.testing.assert_close(opened.logits(split), opened.logits(whole), rtol=0, atol=1e-6)
    assert all(factors.B.any() for factors in whole.adapter("global").values())


@pytest.mark.parametrize("allocation", ["fim", "bottleneck"])
def test_a_resumed_run_is_bit_identical(
    allocation: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    chosen = {
        "name": "fed-hello",
        "layers": [0.5, 1.0],
        "allocation": allocation,
        "randomised": True,
    }
    resumes(tiny_bert, silos, tmp_path, [(1, 1), (3, 1)], method=chosen, run={"rounds": 3})


def test_only_the_trained_layers_travel_up(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    run(tiny_job(tiny_bert, silos, **FIM), tmp_path / "out")
    whole = 4 * 4 * PER_RANK
    for name in ("site-0", "site-1", "site-2"):
        assert sent(tmp_path / "out", name) == [(whole // 2, whole)] * 3


@pytest.mark.parametrize("options", [{"choice": "groups"}, {"allocation": "triangle"}])
def test_with_its_options_it_keeps_what_a_method_promises(options: dict[str, Any]) -> None:
    satisfies(FedHeLLo, **options)
