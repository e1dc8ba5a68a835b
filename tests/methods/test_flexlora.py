"""FlexLoRA against a dense SVD of the dense mean; its directions, scales and messages."""

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
    lines,
    method,
    model,
    sent,
    small_job,
)
from torch import Tensor

from fedgrove.methods.contract import ClientInfo


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("split", ["authors", "balanced"])
@pytest.mark.parametrize("scaling", ["global", "client"])
@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_every_client_gets_its_own_truncation(scaling: Any, stretch: float, split: str) -> None:
    chosen = method("flexlora", scaling, split=split)
    adapters = client_draws(chosen, stretch)
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters))
    for client in CLIENTS:
        offer = chosen.offer(state, 2, client)
        for site in SITES:
            f = offer.adapter[site]
            assert f.rank == client.rank
            assert f.scale == chosen.setting.scale(client.rank)
            close(
                model(chosen.personal(client, offer, {}), site),
                best(dense(adapters, WEIGHTS, site), f.rank),
                1e-10,
            )
            if split == "authors":  # B = U S / s, A = V^T
                torch.testing.assert_close(f.A @ f.A.T, torch.eye(f.rank, dtype=f.A.dtype))
            else:  # the root of the singular value in both
                torch.testing.assert_close(f.B.norm(dim=0), f.A.norm(dim=1))


def test_at_full_rank_it_is_exact() -> None:
    for rank in (6, 10):  # the smallest side of a site, and the sum of the ranks
        sites = {name: SITES[name] for name in SITES}
        chosen = method("flexlora", rank=rank, sites=sites)
        adapters = client_draws(chosen)
        big = [ClientInfo("c0", min(rank, 6), 5)]
        state = aggregated(chosen, chosen.begin(big), 1, sent(adapters))
        close(model(chosen.global_assembly(state), "v"), dense(adapters, WEIGHTS, "v"))


def test_the_server_loses_nothing() -> None:
    """N_agg is 0: the global update is the mean itself, whatever the largest rank (methods.md,
    noise analysis).
    """
    chosen = method("flexlora")
    adapters = client_draws(chosen)
    state = chosen.begin(CLIENTS)
    for round in (1, 2):
        state = aggregated(chosen, state, round, sent(adapters))
        whole = chosen.global_assembly(state)
        for site in SITES:
            close(model(whole, site), dense(adapters, WEIGHTS, site))


@pytest.mark.parametrize("name", ["flexlora", "raflora"])
@pytest.mark.parametrize("split", ["authors", "balanced"])
def test_round_1_starts_from_the_shared_draw_whatever_the_scale(name: str, split: str) -> None:
    chosen = method(name, "client", split=split)
    state = chosen.begin(CLIENTS)
    for client in CLIENTS:
        draw = chosen.setting.shared_draw(client.rank)
        for site, f in chosen.offer(state, 1, client).adapter.items():
            assert torch.equal(f.A, draw[site].A)
            assert not f.B.any()
            assert f.scale == chosen.setting.scale(client.rank)


def test_with_the_authors_split_no_row_of_a_is_zero() -> None:
    chosen = method("flexlora")
    adapters = client_draws(chosen, ranks=(2,))  # the others are away
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters))
    for site, f in state.whole.items():
        close(f.product(), dense(adapters, [1.0], site))
        torch.testing.assert_close(f.A @ f.A.T, torch.eye(4, dtype=f.A.dtype))


@pytest.mark.parametrize("scaling", ["global", "client"])
def test_a_direction_that_nobody_trained_is_alive(scaling: Any) -> None:
    chosen = method("flexlora", scaling, split="balanced")
    adapters = client_draws(chosen, ranks=(2,))  # the others are away
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters))
    for site, f in state.whole.items():
        close(f.product(), dense(adapters, [1.0], site))
        assert not f.B[:, 2:].any()
        torch.testing.assert_close(f.A[2:], chosen.setting.shared_draw()[site].A[2:].double())
    offer = chosen.offer(state, 2, CLIENTS[3]).adapter  # rank 3; its third module
    torch.testing.assert_close(offer["q"].A[2:], chosen.setting.shared_draw()["q"].A[2:3].double())
    zero = {site: f.map(torch.zeros_like) for site, f in adapters[0].items()}
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent([zero]))
    assert torch.equal(state.whole["q"].A, chosen.setting.shared_draw()["q"].A.double())


def test_a_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    out = check_run(small_job("flexlora", tiny_bert, silos, lora={"scaling": "client"}), tmp_path)
    ranks = {"site-0": 2, "site-1": 4, "site-2": 3}
    for line in lines(out, "train"):
        assert line["bytes_up"] == line["bytes_down"] == 4 * ONE * ranks[line["client"]]
