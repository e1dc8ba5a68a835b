"""SDFLoRA (2601.11219): the stack across ranks is the exact mean of products; the private module
stays.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import (
    PER_RANK,
    SITES,
    Opened,
    adapter,
    aggregated,
    exports,
    info,
    method,
    refuses_to_send,
    resumes,
    satisfies,
    sent,
    update,
    watched,
)
from tests.tiny import tiny_job

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.assembly import as_one_adapter
from fedgrove.ground.errors import FedgroveError
from fedgrove.methods.contract import reveal
from fedgrove.methods.sdflora import Private, SDFLoRA, Shared, clipped
from fedgrove.start import run

JOB: dict[str, Any] = {
    "method": {"name": "sdflora"},
    "run": {"rounds": 2},
    "federation": {"ranks": [2, 4]},
}


def dense(adapters: list[Adapter], shares: list[float], site: str) -> torch.Tensor:
    return sum(
        (p * a[site].product() for p, a in zip(shares, adapters, strict=True)), torch.zeros(())
    )


def test_each_client_gets_the_best_approximation_of_its_rank_of_the_mean_product() -> None:
    ours = method("sdflora", rank=4)
    adapters = [adapter(n, rank=r, scale=6.0 / 4, size=10.0**n) for n, r in enumerate((1, 2, 1))]
    shares = [0.5, 0.3, 0.2]
    updates = [
        update(f"c{n}", int(100 * p), adapter=a)
        for n, (a, p) in enumerate(zip(adapters, shares, strict=True))
    ]
    state = aggregated(ours, {"whole": {}}, 1, updates)
    for rank in (1, 2, 4):
        offer = ours.offer(state, 2, info("x", rank=rank)).shared
        for site in SITES:
            want = dense(adapters, shares, site)
            u, s, vh = torch.linalg.svd(want, full_matrices=False)
            best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
            assert offer[site].rank == rank
            torch.testing.assert_close(
                offer[site].product(), best, rtol=1e-9, atol=1e-9 * float(s[0])
            )
    # the stack has rank 4, so a client of that rank holds the mean exactly
    torch.testing.assert_close(
        state.whole["layer.3.query"].product(), dense(adapters, shares, "layer.3.query")
    )


def test_the_limit_holds_over_all_numbers_and_noise_is_added_to_the_change() -> None:
    before, after = adapter(1), adapter(2)
    rng = torch.Generator().manual_seed(0)

    def norm(found: Adapter) -> float:
        parts = [
            (x - y).flatten()
            for s in SITES
            for x, y in ((found[s].A, before[s].A), (found[s].B, before[s].B))
        ]
        return float(torch.cat(parts).norm())

    whole = norm(after)
    assert norm(clipped(before, after, 0.5, 0.0, rng)) == pytest.approx(0.5)
    assert norm(clipped(before, after, 2 * whole, 0.0, rng)) == pytest.approx(whole)
    count = sum(f.A.numel() + f.B.numel() for f in after.values())
    assert norm(clipped(before, before, 1.0, 3.0, rng)) == pytest.approx(3.0 * count**0.5, rel=0.15)
    halfway = clipped(before, after, whole / 2, 0.0, rng)
    torch.testing.assert_close(
        halfway["layer.0.query"].A, (before["layer.0.query"].A + after["layer.0.query"].A) / 2
    )


def test_noise_without_a_limit_is_refused(tiny_bert: Path, silos: Path) -> None:
    with pytest.raises(FedgroveError, match="dp_clip"):
        tiny_job(tiny_bert, silos, method={"name": "sdflora", "dp_noise": 1.0})


def test_noise_falls_on_the_shared_module_alone(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    stores = []
    for noise, out in ((0.0, "calm"), (1.0, "noisy")):
        job = tiny_job(
            tiny_bert,
            silos,
            method={"name": "sdflora", "dp_clip": 0.1, "dp_noise": noise},
            run={"rounds": 1},
        )
        run(job, tmp_path / out)
        stores.append(Opened(job, tmp_path / out))
    calm, noisy = stores
    for site, factors in calm.state.whole.items():
        assert not torch.allclose(factors.product(), noisy.state.whole[site].product())
    for name, store in calm.stores.items():
        mine, other = reveal(store["mine"])["own"], reveal(noisy.stores[name]["mine"])["own"]
        assert all(torch.equal(mine[s].B, other[s].B) and mine[s].B.any() for s in mine)


def test_a_resumed_run_is_bit_identical(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(
        tiny_bert, silos, tmp_path, [(1, 1), (2, 2)],
        method={"name": "sdflora", "dp_clip": 1.0, "dp_noise": 0.01}, run={"rounds": 2},
        federation={"ranks": [2, 4]},
    )  # fmt: skip


def test_what_travels_and_what_stays(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = watched(monkeypatch)
    found = run(tiny_job(tiny_bert, silos, **JOB), tmp_path / "out")
    ranks = {name: row["rank"] for name, row in found.summary["clients"].items()}
    assert set(ranks.values()) == {2, 4}
    for name, rank in ranks.items():
        assert sent(tmp_path / "out", name) == [(4 * rank * PER_RANK, 4 * rank * PER_RANK)] * 2
    assert wire.private
    assert not wire.leaks()
    for mine in itertools.islice(wire.kept, 2):
        assert mine.own
        assert not mine.fusion
        refuses_to_send(mine)


def test_the_export_is_the_sum_of_both_modules(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    def both(assembly: object) -> None:
        assert [t.name for t in assembly.terms] == ["shared", "own"]  # type: ignore[attr-defined]

    exports(tiny_bert, silos, tmp_path, both, **JOB)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_two_sigmoids_weigh_the_modules_as_in_the_authors_code(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    ours = method("sdflora", fusion="sigmoid")
    one, two = adapter(1), adapter(2)
    assembly = ours.personal(info("a"), Shared(one), Private(two))
    whole = as_one_adapter(assembly, SITES)
    for site in SITES:
        want = sigmoid(0.7) * one[site].product() + sigmoid(0.3) * two[site].product()
        torch.testing.assert_close(whole[site].product(), want, rtol=1e-4, atol=1e-4)
    assert {each.home for each in assembly.extras.values()} == {"client"}
    job: dict[str, Any] = {**JOB, "method": {"name": "sdflora", "fusion": "sigmoid"}}
    opened = exports(tiny_bert, silos, tmp_path, **job)
    for store in opened.stores.values():
        weights = reveal(store["mine"])["fusion"]
        assert len(weights) == 2 * 4
        assert all(float(w) not in (0.7, 0.3) for w in weights.values())  # they trained
        refuses_to_send(store["mine"])


@pytest.mark.parametrize("options", [{"fusion": "sigmoid"}, {"dp_clip": 1.0, "dp_noise": 0.1}])
def test_with_its_options_it_keeps_what_a_method_promises(options: dict[str, Any]) -> None:
    satisfies(SDFLoRA, **options)
