"""Secure aggregation in a run: what clients put under their masks, what the server makes of the sum, and
which jobs cannot have it. The exchanges themselves: ``tests/secure``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tests.privacy.test_client_dp import (
    KEY,
    SUMS,
    federation,
    lines,
    moved,
    protection,
    summary,
)
from tests.stops import StopAfter
from tests.test_run import adapters
from tests.tiny import tiny_job

from fedgrove.adapters.tree import leaves
from fedgrove.engines.local import LocalEngine
from fedgrove.ground.errors import JobError, RunError
from fedgrove.job.privacy import PrivacySection
from fedgrove.methods.contract import Update
from fedgrove.privacy import accountant
from fedgrove.privacy.client_dp import Protection, change
from fedgrove.privacy.masked import LEAST, MASKED, TAIL, Addition, Format, Opened, weighted
from fedgrove.secure.fixed import signed
from fedgrove.secure.messages import Terms
from fedgrove.secure.room import Room
from fedgrove.start import run


def room_of(clients: Sequence[str], round: int = 2) -> Room:
    return Room(Terms("run", round, "attempt", 2 / 3), clients)


def opened(
    method: Any, head: Any, clients: Any, updates: Any, offer: Any, **section: Any
) -> Opened:
    """What the server can read of updates that were masked for ``section``."""
    room, scale = room_of(list(clients)), None
    if weighted(method):
        scale = max(update.examples for update in updates)
    masked = {}
    for update in updates:
        name = update.client
        own = change(method, head, clients[name], update.content, offer(name), 2)
        addition = Addition(name, 2, own, update.examples, scale)
        masked[name] = room.mask(name, addition.words(PrivacySection(**section), len(clients), KEY))
    return Opened(signed(room.total(masked)), len(clients), scale)


def hidden(update: Update) -> Update:
    """All that the server has of an update beside its part of the sum."""
    return Update(update.client, update.examples, {})


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("name", SUMS)
def test_the_server_makes_of_masked_updates_what_it_makes_of_plain_ones(
    name: str, weights: str
) -> None:
    """Fed-PLoRA and FSLoRA among them, whose clients send vectors over all R indices. With weights
    the method itself says what it makes of plain updates.
    """
    if weights == "examples" and name == "fed-plora":
        pytest.skip("it weighs by holders")
    method, state, (clients, head, offer) = federation(name, weights)
    updates = moved(method, clients, head, offer)
    section = {"clip": 50.0, "secure_aggregation": True}
    guard = protection(method, head, **section)
    total = opened(method, head, clients, updates, offer, **section)
    assert (total.scale is None) == (weights == "uniform")
    mean = guard.combine(2, clients, [hidden(u) for u in updates], offer, offer, total)
    parts = [Update(u.client, u.examples, u.content["method"]) for u in updates]
    ours = method.aggregate(state, 2, [Update("m", 1, mean.content["method"])])
    theirs = method.aggregate(state, 2, parts)
    size = Format.of(guard.section, 3).step
    assert size < 1e-6
    for x, y in zip(_tensors(ours), _tensors(theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=2 * size)
    short = Opened(total.steps[:-1], 3, total.scale)
    with pytest.raises(RunError, match="different versions"):
        guard.combine(2, clients, updates, offer, offer, short)


@pytest.mark.parametrize("scale", [4, 0, 2**31])
def test_a_weight_that_is_none_is_refused(scale: int) -> None:
    addition = Addition("a", 1, torch.zeros(3, dtype=torch.float64), 5, scale)
    with pytest.raises(RunError, match=r"5 examples, and the server weighs them by"):
        addition.words(PrivacySection(clip=1.0, secure_aggregation=True), 3, KEY)


@pytest.mark.parametrize("clients", [2, 16, 1000])
@pytest.mark.parametrize("noise", [0.0, 1.0, 20.0])
def test_the_largest_sum_does_not_overflow(noise: float, clients: int) -> None:
    section = PrivacySection(clip=0.7, client_noise=noise, secure_aggregation=True)
    how = Format.of(section, clients)
    for sign in (1.0, -1.0):
        change = torch.full((3,), sign * 0.7, dtype=torch.float64)
        words = Addition("a", 1, change).words(section, clients, KEY)
        total = signed(words) * clients
        most = clients * 0.7 / how.step + TAIL * how.deviation * math.sqrt(clients)
        assert most < 2**31
        if not noise:
            assert bool((total.abs() < 2**31).all())
            torch.testing.assert_close(
                total.double() * how.step, change * clients, rtol=1e-5, atol=0
            )


def test_numbers_beyond_the_agreed_size_are_refused() -> None:
    section = PrivacySection(clip=2.0, secure_aggregation=True)
    for wrong in (-3.0, math.nan):
        change = torch.tensor([0.0, wrong], dtype=torch.float64)
        with pytest.raises(RunError, match=r"raise privacy\.clip"):
            Addition("a", 1, change).words(section, 4, KEY)


# ------------------------------------------------------------ noise at the clients
def test_the_fewest_that_may_answer_have_the_whole_noise_together() -> None:
    section = PrivacySection(clip=2.0, client_noise=1.5, secure_aggregation=True, threshold=0.6)
    clients, zero = 10, torch.zeros(20_000, dtype=torch.float64)
    how = Format.of(section, clients)
    fewest = 6
    each = [
        signed(Addition(f"c{n}", 1, zero).words(section, clients, KEY)).double() * how.step
        for n in range(fewest)
    ]
    total = torch.stack(each).sum(0)
    wanted = 1.5 * 2.0
    assert wanted <= how.deviation * how.step * math.sqrt(fewest) < 1.001 * wanted
    assert math.isclose(float(total.std()), wanted, rel_tol=0.03)
    assert stats.kstest((total / wanted).numpy(), "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack(each[:2]))[0, 1])) < 0.03
    # the same data again gives the same noise, other data other noise
    again = Addition("c0", 1, zero).words(section, clients, KEY)
    assert torch.equal(signed(again).double() * how.step, each[0])
    other = signed(Addition("c0", 1, zero + 0.1).words(section, clients, KEY)).double() * how.step
    assert float((other - each[0]).std()) > wanted / math.sqrt(fewest)


def test_a_share_has_so_many_steps_that_a_sum_of_them_is_gaussian() -> None:
    for clients in (2, 100, 10_000):
        section = PrivacySection(clip=1.0, client_noise=1e-6, secure_aggregation=True)
        assert Format.of(section, clients).deviation >= LEAST
    assert 10 * 10_000 * math.exp(-((math.pi * LEAST) ** 2)) == 0.0


def test_the_server_needs_no_key_where_the_clients_add_the_noise(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protection, "_noisy", None)
    job = secure_job(tiny_bert, silos, True, privacy={"client_noise": 1.0, "randomness": "secret"})
    run(job, tmp_path / "out")
    told = summary(tmp_path / "out")["privacy"]["client"]
    assert told["epsilon"] == accountant.epsilon(1.0, [(1.0, 3)], told["delta"])


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [tensor for _, tensor in leaves(tree)]


# ------------------------------------------------------------ runs
def secure_job(bert: Path, silos: Path, secure: bool, /, **changes: dict[str, Any]) -> Any:
    values: dict[str, dict[str, Any]] = {
        "method": {"name": "fedit", "weights": "uniform"},
        "federation": {"head": "shared"},
        "privacy": {"clip": 10.0, "secure_aggregation": secure, "randomness": "seed"},
        "train": {"optimizer": "sgd", "lr": 0.05},
    }
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    values = {
        name: {k: v for k, v in keys.items() if v is not None} for name, keys in values.items()
    }
    return tiny_job(bert, silos, **values)


def test_a_secure_run_learns_the_same_and_its_server_sees_masked_vectors_alone(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(secure_job(tiny_bert, silos, False), tmp_path / "plain")
    seen: list[Any] = []
    train = LocalEngine.train

    def watched(self: LocalEngine, *arguments: Any) -> Any:
        for arrival in train(self, *arguments):
            seen.append(arrival.update.content)
            yield arrival

    monkeypatch.setattr(LocalEngine, "train", watched)
    run(secure_job(tiny_bert, silos, True), tmp_path / "secure")
    assert len(seen) == 9
    assert all(
        set(content) == {MASKED} and content[MASKED].dtype == torch.int32 for content in seen
    )
    for one, other in zip(lines(tmp_path / "plain"), lines(tmp_path / "secure"), strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-4)
    assert summary(tmp_path / "secure")["privacy"]["secure_aggregation"] is True
    # as many numbers of four bytes as without: fixed point costs nothing in a 32-bit ring
    assert summary(tmp_path / "secure")["bytes"] == summary(tmp_path / "plain")["bytes"]


def test_it_resumes_bit_for_bit_although_its_keys_are_new(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = secure_job(tiny_bert, silos, True, privacy={"client_noise": 0.5})
    run(job, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "cut", callbacks=[StopAfter(2)])
    run(job, tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "cut")


def test_a_weighted_mean_is_the_plain_one(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """By the clients' examples, whose sum is masked too: one number of four bytes more for each."""
    plain: dict[str, dict[str, Any]] = {
        "method": {"weights": "examples"},
        "privacy": {"clip": None, "secure_aggregation": False},
    }
    run(secure_job(tiny_bert, silos, False, **plain), tmp_path / "plain")
    run(secure_job(tiny_bert, silos, True, method={"weights": "examples"}), tmp_path / "secure")
    for one, other in zip(lines(tmp_path / "plain"), lines(tmp_path / "secure"), strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-4)
    up = [summary(tmp_path / name)["bytes"]["up"] for name in ("plain", "secure")]
    assert up[1] - up[0] == 3 * 3 * 4


def test_fed_plora_pays_for_all_indices(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """Clients of rank 1, 2 and 4 of R = 4 send 1 + 2 + 4 modules plainly, and 3 · 4 where they must
    add up.
    """
    method = {"name": "fed-plora", "weights": None}
    changes: dict[str, Any] = {
        "lora": {"rank": 4},
        "federation": {"ranks": [1, 2, 4], "head": "local"},
    }
    for name, privacy in (("plain", {"clip": None, "secure_aggregation": False}), ("secure", {})):
        job = secure_job(
            tiny_bert, silos, name == "secure", method=method, privacy=privacy, **changes
        )
        run(job, tmp_path / name)
    one, other = (summary(tmp_path / name)["bytes"]["up"] for name in ("plain", "secure"))
    assert other * (1 + 2 + 4) == one * 3 * 4
    for first, second in zip(lines(tmp_path / "plain"), lines(tmp_path / "secure"), strict=True):
        assert math.isclose(first["loss"], second["loss"], rel_tol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"name": "fedtreelora", "weights": None}}, "tree"),
        (
            {"method": {"name": "fed-plora", "weights": None, "selection": "least_trained"}},
            "least_trained",
        ),
        (
            {"method": {"weights": "examples"}, "privacy": {"client_noise": 1.0}},
            "same weight",
        ),
        ({"federation": {"fraction": 0.3}}, "two clients or more"),
        ({"federation": {"fraction": 0.7}, "privacy": {"client_noise": 1.0}}, "coin"),
    ],
)
def test_what_cannot_be_summed_is_refused(
    changes: Any, words: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=words):
        run(secure_job(tiny_bert, silos, True, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
