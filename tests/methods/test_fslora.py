"""FSLoRA: the mean of sketched changes, the sketch against its definition, and FedIT at full
budget.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import aggregated, fedit_mean
from tests.methods.rules import (
    CLIENTS,
    EXAMPLES,
    ONE,
    SITES,
    WEIGHTS,
    check_run,
    close,
    draw,
    lines,
    method,
    model,
    sent,
    small_job,
    updates,
)

from fedgrove.adapters import Adapter, Assembly, Term
from fedgrove.ground.errors import JobError
from fedgrove.methods.contract import ClientInfo, Trained
from fedgrove.methods.records import Whole


def work(
    chosen: Any, client: ClientInfo, start: Adapter, round: int, seed: int, stretch: float
) -> Any:
    """What a client sends if its sketch moved by a random draw, and that draw."""
    (step,) = chosen.plan(client, Whole(start), {}, round)
    moved = draw(seed, client.rank, stretch=stretch)
    end = {
        s: type(f)(f.A + moved[s].A, f.B + moved[s].B, f.scale)
        for s, f in step.assembly.adapter("sketch").items()
    }
    done = Trained(Assembly((Term("sketch", end),)), 0.0, 1)
    content, mine = chosen.report(client, [done], Whole(start), {}, round)
    assert mine == {}
    return content, moved


@pytest.mark.parametrize("weights", ["examples", "uniform"])
@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_changes_are_averaged_over_all_sampled_clients(weights: str, stretch: float) -> None:
    chosen, start = method("fslora", weights=weights), draw(50, 4)
    parts = WEIGHTS if weights == "examples" else [0.25] * 4
    for round in (1, 2, 3):
        arrived = [
            work(chosen, c, start, round, n, stretch ** (n - 1)) for n, c in enumerate(CLIENTS)
        ]
        after = aggregated(
            chosen, Whole(start), round, updates([content for content, _ in arrived])
        ).whole
        for site in SITES:
            a, b = start[site].A.clone(), start[site].B.clone()
            for client, (content, moved), weight in zip(CLIENTS, arrived, parts, strict=True):
                chosen_now = chosen.mask(client, round)
                assert content.indices == chosen_now
                for row, j in enumerate(chosen_now):
                    a[j] += weight * moved[site].A[row]
                    b[:, j] += weight * moved[site].B[:, row]
            close(after[site].A, a)
            close(after[site].B, b)
        untouched = set(range(4)).difference(*(chosen.mask(client, round) for client in CLIENTS))
        assert not untouched  # one of them has the full budget


def test_the_client_runs_b_s_a_with_the_unbiased_mask() -> None:
    chosen, start = method("fslora"), draw(50, 4)
    for round in (1, 2, 3):
        for client in CLIENTS:
            (step,) = chosen.plan(client, Whole(start), {}, round)
            mask = torch.zeros(4, dtype=torch.float64)
            mask[chosen.mask(client, round)] = 4 / client.rank
            for site, f in start.items():
                close(model(step.assembly, site), f.scale * f.B @ mask.diag() @ f.A)
                close(model(chosen.personal(client, Whole(start), {}), site), f.product())


def test_the_mask_is_uniform_and_new_in_each_round() -> None:
    chosen = method("fslora")
    drawn = [tuple(chosen.mask(CLIENTS[0], round)) for round in range(300)]
    counts = Counter(drawn)
    assert len(counts) == 6  # every pair of 4
    assert max(counts.values()) < 90  # 50 expected, standard deviation 6.5
    assert drawn == [tuple(method("fslora").mask(CLIENTS[0], round)) for round in range(300)]
    assert drawn != [tuple(chosen.mask(ClientInfo("other", 2, 1), round)) for round in range(300)]


def test_at_full_budget_it_is_fedit() -> None:
    chosen, start = method("fslora", weights="examples"), draw(50, 4)
    clients = [ClientInfo(f"c{n}", 4, EXAMPLES[n]) for n in range(4)]
    arrived = [
        work(chosen, client, start, 1, n, 30.0 ** (n - 1)) for n, client in enumerate(clients)
    ]
    ends = [
        {s: type(f)(start[s].A + f.A, start[s].B + f.B, f.scale) for s, f in moved.items()}
        for _, moved in arrived
    ]
    plain = fedit_mean(sent(ends))
    after = aggregated(chosen, Whole(start), 1, updates([content for content, _ in arrived])).whole
    for site in SITES:
        close(after[site].A, plain[site].A)
        close(after[site].B, plain[site].B)


def test_a_client_scale_is_refused_unless_it_is_the_global_one() -> None:
    method("fslora").check(CLIENTS)
    method("fslora", "client").check([ClientInfo("a", 4, 1)])
    with pytest.raises(
        JobError, match=r'lora\.scaling = "client" gives c0 the scale alpha / 2.*alpha / 4'
    ):
        method("fslora", "client").check(CLIENTS)


def test_a_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = small_job("fslora", tiny_bert, silos, train={"weight_decay": 0.5})
    out = check_run(job, tmp_path)
    ranks = {"site-0": 2, "site-1": 4, "site-2": 3}
    for line in lines(out, "train"):
        assert line["bytes_up"] == 4 * ONE * ranks[line["client"]]
        assert line["bytes_down"] == 4 * ONE * 4
