"""FedEx-LoRA: mean and residual are together the exact mean of the products, however many
rounds.
"""

from __future__ import annotations

from pathlib import Path

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
    lines,
    method,
    model,
    sent,
    small_job,
)

from fedgrove.methods._merged import Held

EQUAL = (4, 4, 4, 4)


@pytest.mark.parametrize("stretch", [1.0, 30.0, 0.01])
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_mean_and_residual_are_the_exact_mean(stretch: float, weights: str) -> None:
    chosen = method("fedex-lora", weights=weights)
    parts = WEIGHTS if weights == "examples" else [0.25] * 4
    state, merged = chosen.begin(CLIENTS), {site: torch.zeros(()) for site in SITES}
    for round in (1, 2, 3):
        adapters = client_draws(chosen, stretch + round, EQUAL)
        state = aggregated(chosen, state, round, sent(adapters))
        plain = fedit_mean(sent(adapters), weights)
        for site, place in SITES.items():
            assert torch.equal(state.whole[site].A, plain[site].A)
            assert torch.equal(state.whole[site].B, plain[site].B)
            whole = dense(adapters, parts, site)
            close(model(chosen.global_assembly(state), site), merged[site] + whole, 1e-10)
            merged[site] = merged[site] + whole - plain[site].product()
            assert state.merged.delta[site].rank <= min(place.in_features, place.out_features)


def test_what_goes_down_brings_every_client_to_the_global_model() -> None:
    chosen = method("fedex-lora")
    state = chosen.begin(CLIENTS)
    before = [aggregated(chosen, state, 1, sent(client_draws(chosen, 2.0, EQUAL)))]
    state = aggregated(chosen, before[0], 2, sent(client_draws(chosen, 3.0, (4, 4))))  # c0 and c1
    for client, mine in ((CLIENTS[0], Held(before[0].merged.delta)), (CLIENTS[2], Held())):
        offer = chosen.offer(state, 3, client)
        assert (offer.residual.increment is None) == (mine.delta is None)
        for site in SITES:
            want = model(chosen.global_assembly(state), site)
            assert torch.equal(model(chosen.personal(client, offer, mine), site), want)


def test_one_client_leaves_no_residual() -> None:
    chosen = method("fedex-lora")
    (adapter,) = client_draws(chosen, ranks=(4,))
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent([adapter]))
    for site in SITES:
        close(model(chosen.global_assembly(state), site), dense([adapter], [1.0], site))
        assert state.merged.delta[site].product().norm() <= 1e-12 * adapter[site].product().norm()
        assert state.merged.delta[site].rank == 1


def test_a_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    out = check_run(small_job("fedex-lora", tiny_bert, silos, run={"rounds": 3}), tmp_path)
    trained = lines(out, "train")
    groups = [{line["client"] for line in trained if line["round"] == round} for round in (1, 2, 3)]
    for line in trained:
        assert line["bytes_up"] == 4 * ONE * 4
        # B = 0 at first, so two clients leave a residual of rank (N - 1) r = 4 in the first round.
        away = line["round"] > 1 and line["client"] not in groups[line["round"] - 2]
        modules = 4 * (line["round"] - 1) if away else 4 * (line["round"] > 1)
        assert line["bytes_down"] == 4 * ONE * (4 + modules)
