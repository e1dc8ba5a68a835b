"""Secure aggregation: what the server sees, what the sum is, what it costs, and when it fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.privacy.test_client_dp import SUMS, federation, lines, moved, protection, summary
from tests.stops import StopAfter
from tests.test_run import adapters
from tests.tiny import tiny_job

from fedgrove.adapters.tree import leaves
from fedgrove.engines.local import LocalEngine
from fedgrove.ground.errors import JobError, RunError
from fedgrove.methods.contract import Update
from fedgrove.privacy.client_dp import change
from fedgrove.privacy.secure import MASKED, Party, Room, signed, step, summed, to_fixed
from fedgrove.start import run

NAMES = ["a", "b", "c", "d"]


def vectors(count: int = 5000, bound: float = 2.0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        n: bound * (2 * torch.rand(count, generator=draw, dtype=torch.float64) - 1) for n in NAMES
    }


def from_fixed(total: np.ndarray, clients: int, bound: float) -> torch.Tensor:
    return signed(total).double() * step(clients, bound)


def test_the_sum_is_the_plain_sum_to_a_step_for_each() -> None:
    room, given = Room(1, NAMES), vectors()
    masked = [room.conceal(name, x, 2.0)[MASKED] for name, x in given.items()]
    total = from_fixed(summed(masked), len(NAMES), 2.0)
    error = (total - sum(given.values(), torch.zeros(5000))).abs().max()
    assert 0 < float(error) <= len(NAMES) * step(len(NAMES), 2.0)
    assert step(len(NAMES), 2.0) < 1e-8


def test_no_number_grows_in_fixed_point() -> None:
    """The server's noise is made for the norm that the clip allows."""
    for values in vectors().values():
        fixed = from_fixed(to_fixed(values, len(NAMES), 2.0, "a"), len(NAMES), 2.0)
        assert bool((fixed.abs() <= values.abs()).all())
        assert bool((fixed.abs() < values.abs()).any())


def test_a_masked_vector_is_noise_to_the_server() -> None:
    """The same update masked twice shares nothing; its bits are even; a subset's sum is noise
    too.
    """
    zero = torch.zeros(20_000, dtype=torch.float64)
    first, second = (Room(1, NAMES).conceal("a", zero, 2.0)[MASKED] for _ in range(2))
    assert first.dtype == torch.int32
    assert float((first == second).double().mean()) < 0.001
    for masked in (first, torch.from_numpy(summed([first, second]).view(np.int32).copy())):
        bits = np.unpackbits(masked.numpy().view(np.uint8))
        assert abs(bits.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(bits))
        assert (
            abs(
                float(
                    np.corrcoef(
                        masked.numpy()[:-1].astype(float), masked.numpy()[1:].astype(float)
                    )[0, 1]
                )
            )
            < 0.03
        )
    room = Room(2, NAMES)
    three = [room.conceal(name, zero, 2.0)[MASKED] for name in NAMES[:3]]
    assert float(from_fixed(summed(three), 4, 2.0).abs().mean()) > 0.1, (
        "without the fourth the sum means something"
    )


def test_a_mask_belongs_to_its_pair_and_its_round() -> None:
    one, other = Party("a", 1), Party("b", 1)
    publics = {"a": one.public, "b": other.public}
    zero = np.zeros(100, dtype=np.uint32)
    mine, theirs = one.mask(zero, publics), other.mask(zero, publics)
    assert not summed([mine, theirs]).any()
    later = Party("a", 2)
    later._key = one._key  # the same keys in another round
    assert not torch.equal(later.mask(zero, publics), mine)


def test_numbers_beyond_the_agreed_size_and_lone_clients_are_refused() -> None:
    with pytest.raises(RunError, match=r"raise privacy\.clip"):
        to_fixed(torch.tensor([0.0, -3.0]), 4, 2.0, "a")
    with pytest.raises(RunError, match="clip"):
        to_fixed(torch.tensor([math.nan]), 4, 2.0, "a")
    with pytest.raises(RunError, match="two clients"):
        Room(1, ["a"]).conceal("a", torch.zeros(3), 2.0)


@pytest.mark.parametrize("clients", [2, 16, 1000])
def test_the_largest_sum_does_not_overflow(clients: int) -> None:
    for sign in (1.0, -1.0):
        fixed = to_fixed(
            torch.full((3,), sign * 0.7, dtype=torch.float64), clients, 0.7, "a"
        ).astype(np.uint64)
        total = from_fixed(((fixed * clients) % 2**32).astype(np.uint32), clients, 0.7)
        torch.testing.assert_close(
            total, torch.full((3,), sign * 0.7 * clients).double(), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("name", SUMS)
def test_the_server_makes_of_masked_updates_what_it_makes_of_plain_ones(name: str) -> None:
    """Fed-PLoRA and FSLoRA among them, whose clients send vectors over all R indices."""
    method, state, (clients, head, offer) = federation(name)
    updates = moved(method, clients, head, offer)
    room = Room(2, list(clients))
    hidden = []
    for update in updates:
        own = change(method, head, clients[update.client], update.content, offer(update.client), 2)
        hidden.append(
            Update(update.client, update.examples, room.conceal(update.client, own, 50.0))
        )
    guard = protection(method, head, clip=50.0, secure_aggregation=True)
    mean = guard.combine(2, clients, hidden, offer, offer, list(clients))
    plain = protection(method, head, clip=1e9).combine(
        2, clients, updates, offer, offer, list(clients)
    )
    ours, theirs = (
        method.aggregate(state, 2, [Update("m", 1, x.content["method"])]) for x in (mean, plain)
    )
    for x, y in zip(_tensors(ours), _tensors(theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=step(3, 50.0))
    with pytest.raises(RunError, match="c2 was to take part and sent nothing"):
        guard.combine(2, clients, hidden[:2], offer, offer, list(clients))
    short = [*hidden[:2], Update("c2", 1, {MASKED: torch.zeros(3, dtype=torch.int32)})]
    with pytest.raises(RunError, match="length"):
        guard.combine(2, clients, short, offer, offer, list(clients))


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
        ({"method": {"weights": "examples"}}, "same weight"),
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
