"""FedIT: the mean of A and the mean of B."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.methods.kit import (
    PER_RANK,
    SITES,
    adapter,
    aggregated,
    exports,
    info,
    method,
    offered,
    resumes,
    same,
    sent,
    update,
)

from fedgrove.adapters.adapter import Factors
from fedgrove.methods.records import Whole


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_each_factor_is_the_weighted_mean(weights: str) -> None:
    ours = method("fedit", weights=weights)
    adapters = [adapter(n, size=100.0**n) for n in range(3)]
    arrived = [update(f"c{n}", n + 1, adapter=each) for n, each in enumerate(adapters)]
    shares = [1 / 6, 2 / 6, 3 / 6] if weights == "examples" else [1 / 3] * 3
    whole = aggregated(ours, ours.begin([]), 1, arrived).whole
    for site in SITES:
        A = torch.stack([p * each[site].A for p, each in zip(shares, adapters, strict=True)]).sum(0)
        B = torch.stack([p * each[site].B for p, each in zip(shares, adapters, strict=True)]).sum(0)
        torch.testing.assert_close(whole[site].A, A, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole[site].B, B, rtol=1e-12, atol=1e-12)


def test_the_mean_of_the_factors_is_that_of_the_products_only_where_a_factor_is_shared() -> None:
    ours, one, two = method("fedit", weights="uniform"), adapter(1), adapter(2)
    alike = {site: Factors(one[site].A, two[site].B, 2.0) for site in SITES}
    for other, exact in ((alike, True), (two, False)):
        arrived = [update("a", 1, adapter=one), update("b", 1, adapter=other)]
        whole = aggregated(ours, ours.begin([]), 1, arrived).whole
        for site in SITES:
            want = (one[site].product() + other[site].product()) / 2
            near = torch.allclose(whole[site].product(), want, rtol=1e-10, atol=1e-10)
            assert near == exact


def test_one_client_alone_gets_back_what_it_sent_and_everybody_gets_the_same() -> None:
    ours, mine = method("fedit"), adapter(5)
    state = aggregated(ours, ours.begin([]), 1, [update("a", 7, adapter=mine)])
    assert same(state.whole, mine)
    assert same(offered(ours, state, 2, info("b")).whole, mine)
    assert not ours.personal(info("b"), Whole(mine), {}).terms[0].private


def test_a_run_resumes_and_sends_both_factors(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, silos, tmp_path, [(1, 1)], method={"name": "fedit"}, run={"rounds": 2})
    whole = 4 * 4 * PER_RANK
    assert set(sent(tmp_path / "whole", "site-0")) == {(whole, whole)}


def test_the_export_gives_the_logits_of_the_run(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    opened = exports(tiny_bert, silos, tmp_path, method={"name": "fedit"}, run={"rounds": 1})
    assert same(opened.assembly("site-0").adapter("global"), opened.state.whole)
