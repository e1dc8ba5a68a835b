"""FLoRA against the dense mean of products; what each client is sent and holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import aggregated
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
    model,
    sent,
    small_job,
)

from fedgrove.adapters import Assembly, Term
from fedgrove.ground.errors import RunError
from fedgrove.methods._merged import Brought, Held
from fedgrove.methods.contract import Trained, Update
from fedgrove.methods.flora import Stack
from fedgrove.methods.rule import Arrivals, Round, combine


@pytest.mark.parametrize("scaling", ["global", "client"])
@pytest.mark.parametrize("stretch", [1.0, 30.0, 0.01])
def test_the_stack_is_the_exact_mean_of_the_products(scaling: Any, stretch: float) -> None:
    chosen = method("flora", scaling)
    adapters = client_draws(chosen, stretch)
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters))
    for site in SITES:
        close(model(chosen.global_assembly(state), site), dense(adapters, WEIGHTS, site))


def test_only_a_carries_the_weights() -> None:
    chosen = method("flora", "client")
    adapters = client_draws(chosen)
    arrivals = Arrivals(chosen.setting, adapters, WEIGHTS, scale=1.25)
    stack = combine(Stack(chosen.options, Round(SITES)), arrivals).base
    for site in SITES:
        assert torch.equal(stack[site].B, torch.cat([adapter[site].B for adapter in adapters], 1))
        assert stack[site].rank == 10
        row = 0
        for adapter, weight in zip(adapters, WEIGHTS, strict=True):
            f = adapter[site]
            close(stack[site].A[row : row + f.rank], weight * f.scale / 1.25 * f.A)
            row += f.rank


def test_rounds_add_up_and_the_rank_stays_bounded() -> None:
    chosen, rounds = method("flora"), 4
    state, want = chosen.begin(CLIENTS), {site: torch.zeros(()) for site in SITES}
    for round in range(1, rounds + 1):
        adapters = client_draws(chosen, 2.0 + round)
        state = aggregated(chosen, state, round, sent(adapters))
        want = {site: want[site] + dense(adapters, WEIGHTS, site) for site in SITES}
    for site, place in SITES.items():
        close(model(chosen.global_assembly(state), site), want[site], 1e-10)
        assert state.delta[site].rank <= min(place.in_features, place.out_features)


def test_absent_and_present_clients_hold_the_servers_bits() -> None:
    chosen = method("flora")
    state = chosen.begin(CLIENTS)
    stores: dict[str, Held] = {client.name: Held() for client in CLIENTS}
    present = [[0, 1], [0, 2], [0, 1], [1, 2, 3], [0]]
    for round, chosen_now in enumerate(present, start=1):
        arrived = []
        for n in chosen_now:
            client = CLIENTS[n]
            offer = chosen.offer(state, round, client)
            (step,) = chosen.plan(client, offer, stores[client.name], round)
            held = step.assembly.base_delta or {}
            assert held.keys() == state.delta.keys()
            for site, factors in state.delta.items():
                assert torch.equal(held[site].A, factors.A)
                assert torch.equal(held[site].B, factors.B)
            (term,) = step.assembly.terms
            assert not any(bool(f.B.any()) for f in term.adapter.values())
            trained = draw(10 * round + n, client.rank)
            done = Trained(
                Assembly((Term("fresh", trained),), base_delta=step.assembly.base_delta), 0.0, 1
            )
            content, stores[client.name] = chosen.report(
                client, [done], offer, stores[client.name], round
            )
            arrived.append((n, content))
        state = aggregated(
            chosen, state, round, [Update(f"c{n}", 1 + n, content) for n, content in arrived]
        )


def test_every_round_starts_from_another_draw_that_all_clients_share() -> None:
    chosen = method("flora")
    start = {}
    for round in (1, 2, 3):
        for client in CLIENTS:
            (step,) = chosen.plan(client, Brought({}), Held(), round)
            start[round, client.name] = step.assembly.adapter("fresh")["q"].A
    assert torch.equal(start[1, "c1"], chosen.setting.shared_draw()["q"].A)
    assert torch.equal(start[2, "c0"], start[2, "c1"][:2])
    assert not torch.equal(start[1, "c1"], start[2, "c1"])
    assert not torch.equal(start[2, "c1"], start[3, "c1"])


def test_a_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    out = check_run(small_job("flora", tiny_bert, silos, run={"rounds": 3}), tmp_path)
    ranks, trained = {"site-0": 2, "site-1": 4, "site-2": 3}, lines(out, "train")
    groups = [{line["client"] for line in trained if line["round"] == round} for round in (1, 2, 3)]
    stacks = [sum(ranks[name] for name in group) for group in groups]
    for line in trained:
        assert line["bytes_up"] == 4 * ONE * ranks[line["client"]]
        if line["round"] == 1:
            down = 0
        elif line["client"] in groups[line["round"] - 2]:
            down = stacks[line["round"] - 2]
        else:
            down = sum(stacks[: line["round"] - 1])
        assert line["bytes_down"] == 4 * ONE * down
    assert groups[1] & groups[2]  # someone was sent the increment alone


def test_a_client_that_lost_its_store_is_told_so() -> None:
    chosen = method("flora")
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(client_draws(chosen, 2.0, (1, 1))))
    state = aggregated(chosen, state, 2, sent(client_draws(chosen, 3.0, (1, 1))))
    with pytest.raises(RunError, match="store of the rounds before it is gone"):
        chosen.personal(CLIENTS[0], chosen.offer(state, 3, CLIENTS[0]), Held())
