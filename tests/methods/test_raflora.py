"""raFLoRA against a dense sum over the paper's partitions, and FlexLoRA where all ranks are
equal.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import aggregated
from tests.methods.rules import (
    CLIENTS,
    EXAMPLES,
    ONE,
    RANKS,
    SITES,
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
from torch import Tensor

from fedgrove.adapters import Adapter
from fedgrove.adapters.tree import map_tensors
from fedgrove.methods.contract import ClientInfo
from fedgrove.methods.raflora import partition_mean
from fedgrove.methods.records import OneAdapter
from fedgrove.runs.noise import NoiseLab


def partitioned(adapters: list[Adapter], site: str, examples: tuple[int, ...] = EXAMPLES) -> Tensor:
    """Partition by partition: from one distinct rank to the next, over the clients whose rank
    reaches its end.
    """
    total, start = (
        torch.zeros(SITES[site].out_features, SITES[site].in_features, dtype=torch.float64),
        0,
    )
    for end in sorted({adapter[site].rank for adapter in adapters}):
        owners = [
            (a[site], n) for a, n in zip(adapters, examples, strict=False) if a[site].rank >= end
        ]
        whole = sum(n for _, n in owners)
        for f, n in owners:
            total += n / whole * f.scale * f.B[:, start:end] @ f.A[start:end]
        start = end
    return total


@pytest.mark.parametrize("scaling", ["global", "client"])
@pytest.mark.parametrize("stretch", [1.0, 30.0])
def test_each_partition_is_averaged_over_its_owners(scaling: Any, stretch: float) -> None:
    chosen = method("raflora", scaling)
    adapters = client_draws(chosen, stretch)
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters))
    for client in CLIENTS:
        offer = chosen.offer(state, 2, client)
        for site in SITES:
            u, s, vh = torch.linalg.svd(partitioned(adapters, site), full_matrices=False)
            want = u[:, : client.rank] * s[: client.rank] @ vh[: client.rank]
            close(
                model(chosen.personal(client, offer, {}), site), want, 1e-6
            )  # the state is in float32


def test_the_mean_is_exact_before_the_svd_and_keeps_what_nobody_owns() -> None:
    chosen, previous = method("raflora"), draw(9, 4)
    adapters = client_draws(chosen)
    for site, f in partition_mean(adapters, EXAMPLES, previous).items():
        close(f.product(), partitioned(adapters, site))
    small = [adapters[0], adapters[2]]  # ranks 2 and 1
    for site, f in partition_mean(small, [EXAMPLES[0], EXAMPLES[2]], previous).items():
        old = previous[site]
        want = (
            partitioned(small, site, (EXAMPLES[0], EXAMPLES[2]))
            + old.scale * old.B[:, 2:] @ old.A[2:]
        )
        close(f.product(), want)


def test_with_one_rank_it_is_flexlora() -> None:
    ours, theirs = method("raflora", weights="examples"), method("flexlora", weights="examples")
    clients = [ClientInfo(f"c{n}", 3, 9) for n in range(4)]
    adapters = [
        {s: f.map(torch.Tensor.float) for s, f in draw(n, 3, stretch=10.0).items()}
        for n in range(4)
    ]
    mine = aggregated(ours, ours.begin(clients), 1, sent(adapters))
    flex = aggregated(theirs, theirs.begin(clients), 1, sent(adapters))
    ours_down, theirs_down = ours.offer(mine, 2, clients[0]), theirs.offer(flex, 2, clients[0])
    for site in SITES:
        a, b = ours_down.adapter[site], theirs_down.adapter[site]
        close(a.product(), b.product(), 1e-6)
        assert (a.rank, a.scale) == (b.rank, b.scale)
    mixed = client_draws(ours)
    diluted = dense(mixed, [n / sum(EXAMPLES) for n in EXAMPLES], "q")
    assert (partitioned(mixed, "q") - diluted).norm() > 0.01 * diluted.norm()


def test_the_noise_is_what_the_svd_drops(tmp_path: Path) -> None:
    chosen = method("raflora")
    state = map_tensors(chosen.begin(CLIENTS), torch.Tensor.double)
    adapters = client_draws(chosen, 2.0)
    updates = [
        replace(each, content=OneAdapter(each.content["adapter"])) for each in sent(adapters)
    ]
    lab = NoiseLab(chosen, SITES, tmp_path)
    lab.begin(1, state)
    line, _ = lab.measure(aggregated(chosen, state, 1, updates), updates)
    for site in SITES:
        tail = torch.linalg.svdvals(partitioned(adapters, site))[max(RANKS) :].norm()
        assert line["sites"][site]["n_agg"] == pytest.approx(float(tail), rel=1e-9)
        assert line["sites"][site]["bound"] is None


def test_a_run(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    out = check_run(small_job("raflora", tiny_bert, silos, run={"noise": True}), tmp_path)
    ranks = {"site-0": 2, "site-1": 4, "site-2": 3}
    for line in lines(out, "train"):
        assert line["bytes_up"] == line["bytes_down"] == 4 * ONE * ranks[line["client"]]
