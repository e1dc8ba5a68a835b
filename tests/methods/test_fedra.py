"""FedRA (2311.11227) and the allocations it shares with Fed-HeLLo: random matrices, means over
those that had it.
"""

from __future__ import annotations

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
    lines,
    method,
    near,
    offered,
    resumes,
    same,
    sent,
    update,
)
from tests.tiny import tiny_job

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.ground.errors import FedgroveError
from fedgrove.ground.seeds import generator
from fedgrove.methods._layers import budgets, mean_where_held, part, random_rows
from fedgrove.methods._some_layers import LayersState
from fedgrove.start import run

JOB: dict[str, Any] = {"method": {"name": "fedra", "layers": [0.5, 1.0]}, "run": {"rounds": 2}}


def dense(
    previous: Adapter,
    held: dict[int, Adapter],
    rows: dict[int, list[int]],
    weight: dict[int, float],
) -> Adapter:
    """The rule, layer by layer, on stacked matrices."""
    result = {}
    for name, site in SITES.items():
        who = [n for n in held if site.layer in rows[n]]
        total = sum(weight[n] for n in who)
        result[name] = (
            Factors(
                torch.stack([weight[n] / total * held[n][name].A for n in who]).sum(0),
                torch.stack([weight[n] / total * held[n][name].B for n in who]).sum(0),
                2.0,
            )
            if who
            else previous[name]
        )
    return result


def test_each_layer_becomes_the_mean_over_those_that_had_it() -> None:
    previous, held = adapter(9), {n: adapter(n, size=100.0**n) for n in range(3)}
    rows, weight = {0: [0, 2], 1: [2], 2: [0, 2]}, {0: 5.0, 1: 20.0, 2: 75.0}
    parts = [part(held[n], SITES, rows[n]) for n in range(3)]
    near(
        mean_where_held(previous, parts, list(weight.values())), dense(previous, held, rows, weight)
    )
    ours = method("fedra")
    state = LayersState(previous)
    updates = [update(f"c{n}", int(weight[n]), adapter=parts[n]) for n in range(3)]
    after = aggregated(ours, state, 1, updates).whole
    near(after, dense(previous, held, rows, weight))
    assert same(part(after, SITES, [1, 3]), part(previous, SITES, [1, 3]))


@pytest.mark.parametrize("seed", range(20))
def test_every_layer_is_allotted_where_the_budgets_suffice(seed: int) -> None:
    counts, layers = [1, 2, 1, 3], 7
    rows = random_rows(counts, layers, generator(seed))
    assert [len(row) for row in rows] == counts
    assert all(row == sorted(set(row)) for row in rows)
    assert set().union(*rows) == set(range(layers))
    few = random_rows([1, 1], layers, generator(seed))
    assert [len(row) for row in few] == [1, 1]
    assert few[0] != few[1]


def test_the_matrix_is_drawn_again_each_round_and_is_random() -> None:
    drawn = [random_rows([2] * 4, 6, generator(0, round)) for round in range(60)]
    assert len({str(rows) for rows in drawn}) > 50
    share = (
        torch.tensor([[layer in row for layer in range(6)] for rows in drawn for row in rows])
        .double()
        .mean(0)
    )
    assert float((share - 2 / 6).abs().max()) < 0.12
    assert random_rows([2] * 4, 6, generator(0, 3)) == drawn[3]


def test_budgets_are_dealt_in_turn() -> None:
    assert budgets(["a", "b", "c"], (0.25, 1.0), 6) == {"a": 2, "b": 6, "c": 2}
    assert budgets(["a"], (0.01,), 6) == {"a": 1}


def test_a_client_gets_and_runs_its_layers_alone_and_deploys_all() -> None:
    ours = method("fedra", layers=(0.5,))
    clients = [info("a"), info("b")]
    state = ours.begin(clients)
    for round in (1, 2):
        offer = offered(ours, state, round, clients[0])
        assert len(offer.layers) == 2
        assert {SITES[name].layer for name in offer.adapter} == set(offer.layers)
        (step,) = ours.plan(clients[0], offer, {}, round)
        assert step.assembly.layers == frozenset(offer.layers)
        assert list(ours.deploy(state, round, clients[0]).adapter) == list(SITES)
    assert ours.deploy(state, 6, clients[0]).layers is None
    assert ours.personal(clients[0], ours.deploy(state, 6, clients[0]), {}).layers is None


def test_with_all_layers_for_everybody_it_is_fedit(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    ours = {"name": "fedra", "layers": [1.0]}
    equal_runs(tiny_bert, silos, tmp_path, ours, {"name": "fedit"}, run={"rounds": 2})


def test_shares_outside_0_to_1_are_refused(tiny_bert: Path, silos: Path) -> None:
    for bad in ([0.0], [1.5], []):
        with pytest.raises(FedgroveError, match="layers"):
            tiny_job(tiny_bert, silos, method={"name": "fedra", "layers": bad})


def test_a_resumed_run_is_bit_identical(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, silos, tmp_path, [(1, 1), (2, 1)], **JOB)


def test_only_the_allotted_layers_travel(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    run(tiny_job(tiny_bert, silos, **JOB), tmp_path / "out")
    half = 4 * 4 * PER_RANK // 2
    assert sent(tmp_path / "out", "site-0") == [(half, half)] * 2
    assert sent(tmp_path / "out", "site-1") == [(2 * half, 2 * half)] * 2


def test_the_export_is_the_whole_model_and_so_is_each_rounds_measure(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    opened = exports(tiny_bert, silos, tmp_path, **JOB)
    made = tiny_job(tiny_bert, silos, **{**JOB, "federation": {"head": "frozen"}})
    found = run(made, tmp_path / "frozen")
    last = {x["client"]: x["loss"] for x in lines(found.path, "test") if x["round"] == 2}
    assert last == {name: row["loss"] for name, row in found.summary["clients"].items()}
    assert opened.assembly("site-0").layers is None
