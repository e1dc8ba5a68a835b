"""FedRoRA (2609.00632): unit directions, a dense SVD, and for each client its own coefficients along
the directions that it uses most.
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

from fedgrove.adapters.adapter import Factors
from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import ClientInfo, Update
from fedgrove.methods.fedrora import SCALE, Directions, own_directions
from fedgrove.training.live import LiveAssembly


def unit(matrix: Tensor, dim: int) -> Tensor:
    return matrix / matrix.square().sum(dim, keepdim=True).sqrt()


def arrived(chosen: Any, stretch: float) -> tuple[list[Update], list[dict[str, Tensor]]]:
    """What the clients send, and the dense ``B~ S A~`` of each."""
    content: list[Any] = []
    whole: list[dict[str, Tensor]] = []
    for n, adapter in enumerate(client_draws(chosen, stretch)):
        noise = generator(n, "diagonal")
        plain = {site: Factors(f.A, f.B, SCALE) for site, f in adapter.items()}
        strengths = {
            site: torch.randn(f.rank, generator=noise, dtype=torch.float64)
            for site, f in adapter.items()
        }
        content.append(Directions(plain, strengths))
        whole.append(
            {s: unit(f.B, 0) @ strengths[s].diag() @ unit(f.A, 1) for s, f in adapter.items()}
        )
    return updates(content), whole


@pytest.mark.parametrize(("second", "due"), [(1.0, (3.0, 1.0)), (-1.0, (3.0, -1.0))])
def test_two_clients_on_one_direction_keep_their_own_strengths(
    second: float, due: tuple[float, float]
) -> None:
    """R = 1, u = v = e_1, dW_1 = 3 u v^T, dW_2 = ± u v^T, equal counts."""
    chosen = method("fedrora", rank=1)
    clients = [ClientInfo(f"c{n}", 1, 10) for n in range(2)]
    content = []
    for strength in (3.0, second):
        adapter, strengths = {}, {}
        for site, shape in SITES.items():
            A = torch.eye(1, shape.in_features, dtype=torch.float64)
            B = torch.eye(shape.out_features, 1, dtype=torch.float64)
            adapter[site] = Factors(A, B, SCALE)
            strengths[site] = torch.tensor([strength], dtype=torch.float64)
        content.append(Directions(adapter, strengths))
    arrivals = [Update(c.name, 10, each) for c, each in zip(clients, content, strict=True)]
    state = chosen.aggregate(chosen.begin(clients), 1, arrivals)
    for client, strength in zip(clients, due, strict=True):
        offer = chosen.offer(state, 2, client)
        for site in SITES:
            want = torch.zeros(SITES[site].out_features, SITES[site].in_features).double()
            want[0, 0] = strength
            close(model(chosen.personal(client, offer, {}), site), want)
            torch.testing.assert_close(
                offer.strengths[site].abs(), torch.tensor([abs(strength)]).double()
            )
    for site in SITES:  # beside them one mean, 2 or 1
        assert float(state.whole.strengths[site]) == pytest.approx((3 + second) / 2)


@pytest.mark.parametrize("selection", ["magnitude", "value"])
@pytest.mark.parametrize("scaling", ["global", "client"])
@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_every_client_gets_its_own_coefficients_of_the_directions_that_it_uses_most(
    stretch: float, scaling: Any, selection: Any
) -> None:
    chosen = method("fedrora", scaling, selection=selection)
    arrivals, whole = arrived(chosen, stretch)
    state = chosen.aggregate(chosen.begin(CLIENTS), 1, arrivals)
    chose, negative = set(), 0
    for client, own in zip(CLIENTS, whole, strict=True):
        offer = chosen.offer(state, 2, client)
        for site in SITES:
            mean = sum((w * d[site] for w, d in zip(WEIGHTS, whole, strict=True)), torch.zeros(()))
            u, _, vh = torch.linalg.svd(mean, full_matrices=False)
            found = [float(u[:, k] @ own[site] @ vh[k]) for k in range(max(RANKS))]
            rated = [abs(each) for each in found] if selection == "magnitude" else found
            best = sorted(sorted(range(max(RANKS)), key=lambda k: -rated[k])[: client.rank])
            chose.add((client.rank, tuple(best)))
            negative += sum(found[k] < 0 for k in best)
            want = sum((found[k] * torch.outer(u[:, k], vh[k]) for k in best), torch.zeros(()))
            got = model(chosen.personal(client, offer, {}), site)
            close(got, want, 1e-9)
            f = offer.adapter[site]
            assert f.scale == SCALE  # no alpha / r
            ones = torch.ones(client.rank, dtype=torch.float64)
            torch.testing.assert_close(f.B.norm(dim=0), ones)
            torch.testing.assert_close(f.A.norm(dim=1), ones)
    assert any(best != tuple(range(rank)) for rank, best in chose)  # not merely the leading ones
    assert negative  # the sign is kept


def test_the_two_selections_differ_by_the_sign() -> None:
    """The direction that a client uses most, but against the others, is its own by magnitude."""
    site = Factors(torch.eye(2, 3).double(), torch.eye(4, 2).double(), SCALE)
    against = Factors(site.A, site.B * torch.tensor([-5.0, 1.0]), SCALE)
    for by_value, want in ((False, -5.0), (True, 1.0)):
        given = own_directions({"q": site}, {"q": against}, 1, by_value=by_value)
        assert given.strengths["q"].tolist() == [want]


def test_an_absent_client_is_scored_by_its_last_update_and_a_new_one_gets_the_leading() -> None:
    chosen = method("fedrora")
    arrivals, _ = arrived(chosen, 1.0)
    state = chosen.aggregate(chosen.begin(CLIENTS), 1, arrivals[:2])
    assert set(state.latest) == {"c0", "c1"}
    later = chosen.aggregate(state, 2, arrivals[1:2])
    assert set(later.latest) == {"c0", "c1"}
    for site in SITES:
        assert torch.equal(later.latest["c0"][site].A, state.latest["c0"][site].A)
        new = chosen.offer(later, 3, CLIENTS[2])
        assert torch.equal(new.adapter[site].A, later.whole.adapter[site].A[:1])
        assert torch.equal(new.strengths[site], later.whole.strengths[site][:1])


def test_strengths_start_at_one_over_the_root_of_the_rank_and_have_a_rate_of_their_own() -> None:
    chosen = method("fedrora", strength_lr=7.0)
    state = chosen.begin(CLIENTS)
    offers = [chosen.offer(state, 1, client) for client in CLIENTS]
    for client, offer in zip(CLIENTS, offers, strict=True):
        assembly = chosen.personal(client, offer, {})
        (term,) = assembly.terms
        assert (term.train, term.unit) == ("ABD", True)
        for site in SITES:
            f = offer.adapter[site]
            torch.testing.assert_close(f.B.norm(dim=0), torch.ones(client.rank))
            assert torch.equal(f.A, offers[1].adapter[site].A[: client.rank])
            assert offer.strengths[site].tolist() == pytest.approx(
                [client.rank**-0.5] * client.rank
            )
        live = LiveAssembly(
            assembly, device=torch.device("cpu"), dtype=torch.float64, train=True, dropout=0.0
        )
        assert set(live.groups) == {1.0, 7.0}
        assert [tuple(leaf.shape) for leaf in live.groups[7.0]] == [(client.rank,)] * len(SITES)


def test_a_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    out = check_run(small_job("fedrora", tiny_bert, silos), tmp_path)
    ranks = {"site-0": 2, "site-1": 4, "site-2": 3}
    for line in lines(out, "train"):
        assert line["bytes_up"] == line["bytes_down"] == 4 * (ONE + 4) * ranks[line["client"]]
        assert line["loss"] == line["loss"]  # unit rows of zeros would have no gradient
