"""FedRoRA: unit directions, a dense SVD, and for each client the directions that its own update
uses most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.rules import (
    CLIENTS,
    ONE,
    RANKS,
    SITES,
    WEIGHTS,
    check_run,
    client_draws,
    close,
    lines,
    method,
    model,
    small_job,
    updates,
)
from torch import Tensor

from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import Update


def unit(matrix: Tensor, dim: int) -> Tensor:
    return matrix / matrix.square().sum(dim, keepdim=True).sqrt()


def arrived(chosen: Any, stretch: float) -> tuple[list[Update], list[dict[str, Tensor]]]:
    """What the clients send, and the dense ``s B~ S A~`` of each."""
    content: list[dict[str, Any]] = []
    whole: list[dict[str, Tensor]] = []
    for n, adapter in enumerate(client_draws(chosen, stretch)):
        noise = generator(n, "diagonal")
        diagonal = {
            s: torch.randn(f.rank, generator=noise, dtype=torch.float64) for s, f in adapter.items()
        }
        content.append({"adapter": adapter, "diagonal": diagonal})
        whole.append(
            {
                s: f.scale * unit(f.B, 0) @ diagonal[s].diag() @ unit(f.A, 1)
                for s, f in adapter.items()
            }
        )
    return updates(content), whole


@pytest.mark.parametrize("scaling", ["global", "client"])
@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_every_client_gets_the_directions_that_it_uses_most(scaling: Any, stretch: float) -> None:
    chosen = method("fedrora", scaling)
    arrivals, whole = arrived(chosen, stretch)
    state = chosen.aggregate(chosen.begin(CLIENTS), 1, arrivals)
    chose = set()
    for client, own in zip(CLIENTS, whole, strict=True):
        offer = chosen.offer(state, 2, client)
        for site in SITES:
            mean = sum((w * d[site] for w, d in zip(WEIGHTS, whole, strict=True)), torch.zeros(()))
            u, s, vh = torch.linalg.svd(mean, full_matrices=False)
            score = [float(u[:, k] @ own[site] @ vh[k]) for k in range(max(RANKS))]
            best = sorted(sorted(range(max(RANKS)), key=lambda k: -score[k])[: client.rank])
            chose.add((client.rank, tuple(best)))
            want = sum((s[k] * torch.outer(u[:, k], vh[k]) for k in best), torch.zeros(()))
            close(model(chosen.personal(client, offer, {}), site), want, 1e-10)
            f = offer["adapter"][site]
            assert f.scale == chosen.setting.scale(client.rank)
            torch.testing.assert_close(
                f.B.norm(dim=0), torch.ones(client.rank, dtype=torch.float64)
            )
            torch.testing.assert_close(
                f.A.norm(dim=1), torch.ones(client.rank, dtype=torch.float64)
            )
            torch.testing.assert_close(offer["diagonal"][site] * f.scale, s[best])
    assert any(best != tuple(range(rank)) for rank, best in chose)  # not merely the leading ones


def test_an_absent_client_is_scored_by_its_last_update_and_a_new_one_gets_the_leading() -> None:
    chosen = method("fedrora")
    arrivals, _ = arrived(chosen, 1.0)
    state = chosen.aggregate(chosen.begin(CLIENTS), 1, arrivals[:2])
    assert set(state["latest"]) == {"c0", "c1"}
    later = chosen.aggregate(state, 2, arrivals[1:2])
    assert set(later["latest"]) == {"c0", "c1"}
    for site in SITES:
        assert torch.equal(later["latest"]["c0"][site].A, state["latest"]["c0"][site].A)
        new = chosen.offer(later, 3, CLIENTS[2])
        assert torch.equal(new["adapter"][site].A, later["global"][site].A[:1])


def test_the_start_is_alive_and_changes_nothing() -> None:
    chosen = method("fedrora")
    state = chosen.begin(CLIENTS)
    offers = [chosen.offer(state, 1, client) for client in CLIENTS]
    for client, offer in zip(CLIENTS, offers, strict=True):
        (term,) = chosen.personal(client, offer, {}).terms
        assert (term.train, term.unit) == ("ABD", True)
        for site in SITES:
            assert not model(chosen.personal(client, offer, {}), site).any()
            f = offer["adapter"][site]
            torch.testing.assert_close(f.B.norm(dim=0), torch.ones(client.rank))
            assert torch.equal(f.A, offers[1]["adapter"][site].A[: client.rank])


def test_a_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    out = check_run(small_job("fedrora", tiny_bert, silos), tmp_path)
    ranks = {"site-0": 2, "site-1": 4, "site-2": 3}
    for line in lines(out, "train"):
        assert line["bytes_up"] == line["bytes_down"] == 4 * (ONE + 4) * ranks[line["client"]]
        assert line["loss"] == line["loss"]  # unit rows of zeros would have no gradient
