"""Client level: what is clipped, what the noisy mean is, who is drawn, and what it is said to
cost.
"""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.methods import kit
from tests.stops import StopAfter
from tests.test_run import adapters, lines, summary
from tests.tiny import tiny_job

from fedgrove.adapters.tree import leaves, map_tensors
from fedgrove.ground.errors import FedgroveError, JobError, RunError
from fedgrove.job.privacy import PrivacySection
from fedgrove.methods.contract import Update
from fedgrove.methods.head import HeadPolicy
from fedgrove.methods.protocols import needs_each
from fedgrove.methods.registry import names
from fedgrove.privacy import accountant
from fedgrove.privacy.client_dp import MEAN, Protection, change
from fedgrove.privacy.randomness import of_seed
from fedgrove.privacy.reference import untouched
from fedgrove.privacy.vector import bounded, flat, restore
from fedgrove.start import run
from fedgrove.tracking.callback import Callback

KEY = of_seed(1, "test")
#: every method whose server needs no more than sums
SUMS = [name for name in names() if name != "local" and not needs_each(kit.method(name))]
MIXED = ("fed-plora", "fslora")


def shared_head() -> HeadPolicy:
    return HeadPolicy(
        "shared", {"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.zeros(2).double()}
    )


def federation(name: str, weights: str = "uniform") -> tuple[Any, dict[str, Any], Any]:
    """A method, its clients, and an offer for each, all in float64."""
    options: dict[str, Any] = {} if name == "fed-plora" else {"weights": weights}
    method = kit.method(name, **options)
    ranks = (1, 2, 3) if name in MIXED else (3, 3, 3)
    clients = {f"c{n}": kit.info(f"c{n}", rank) for n, rank in enumerate(ranks)}
    state = map_tensors(method.begin(list(clients.values())), torch.Tensor.double)
    head = shared_head()

    def offer(client: str) -> dict[str, Any]:
        return head.beside(kit.offered(method, state, 2, clients[client]), None, newcomer=False)

    return method, state, (clients, head, offer)


def moved(method: Any, clients: Any, head: Any, offer: Any, size: float = 1.0) -> list[Update]:
    """Updates that differ from what a client received by random numbers."""
    updates = []
    for n, (name, info) in enumerate(clients.items()):
        start = untouched(method, head, info, offer(name), 2)
        draw = torch.randn(
            len(flat(start)), generator=torch.Generator().manual_seed(n), dtype=torch.float64
        )
        updates.append(Update(name, 5 + n, restore(start, flat(start) + size * draw)))
    return updates


def protection(method: Any, head: Any, rate: float = 1.0, **section: Any) -> Protection:
    return Protection(PrivacySection(**section), method, head, rate, KEY)


def near(one: Any, other: Any) -> None:
    ours, theirs = list(leaves(one)), list(leaves(other))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    assert ours
    for (_, x), (_, y) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_some_methods_need_no_more_than_sums_and_some_do() -> None:
    assert {"fedit", "fed-plora", "fslora", "ffa-lora"} <= set(SUMS)
    assert not {"fedrot-lora", "hilora", "flexlora", "fedalt"} & set(SUMS)


@pytest.mark.parametrize("name", SUMS)
def test_without_clip_and_noise_the_mean_gives_the_state_that_all_updates_give(name: str) -> None:
    method, state, (clients, head, offer) = federation(name)
    updates = moved(method, clients, head, offer)
    guard = protection(method, head, clip=1e9)
    mean = guard.combine(2, clients, updates, offer, offer)
    assert mean.client == MEAN
    parts = [Update(u.client, u.examples, u.content["method"]) for u in updates]
    wanted = method.aggregate(state, 2, parts)
    assert (
        max(
            float((x - y).abs().max())
            for (_, x), (_, y) in zip(leaves(wanted), leaves(state), strict=True)
        )
        > 0.1
    )
    near(method.aggregate(state, 2, [Update(MEAN, 1, mean.content["method"])]), wanted)
    equal = [Update(u.client, 1, u.content) for u in updates]
    near(head.aggregate(None, [mean]), head.aggregate(None, equal))


@pytest.mark.parametrize("name", SUMS)
def test_a_client_that_learnt_nothing_changed_nothing_and_the_server_knows_it(name: str) -> None:
    method, _, (clients, head, offer) = federation(name)
    for client, info in clients.items():
        start = untouched(method, head, info, offer(client), 2)
        assert len(flat(start)) > 50
        assert not change(method, head, info, start, offer(client), 2).any()


def test_the_clip_is_one_norm_over_adapter_and_head_together() -> None:
    method, _, (clients, head, offer) = federation("fedit")
    (update, *_) = moved(method, clients, head, offer)
    start = untouched(method, head, clients["c0"], offer("c0"), 2)
    before = flat(update.content) - flat(start)
    short = bounded(update.content, start, 0.25, "it")
    after = flat(short) - flat(start)
    assert float(before.norm()) > 1
    assert 0.25 * (1 - 1e-8) < float(after.norm()) <= 0.25
    torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-9, atol=1e-12)
    assert float((short["head"]["weight"] - 1).abs().max()) > 0, "the head has no part in the norm"
    assert bounded(update.content, start, 1e6, "it") is update.content


def test_an_update_of_another_shape_has_no_norm() -> None:
    method, _, (clients, head, offer) = federation("fedit")
    start = untouched(method, head, clients["c0"], offer("c0"), 2)
    with pytest.raises(RunError, match="another shape"):
        bounded({"method": {}}, start, 1.0, "it")


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_the_noise_has_its_deviation_on_every_number_and_the_divisor_is_fixed(rate: float) -> None:
    method, _, (clients, head, offer) = federation("fedit")
    updates = moved(method, clients, head, offer)
    still = protection(method, head, rate, clip=0.5, client_noise=1e-12)
    loud = protection(method, head, rate, clip=0.5, client_noise=3.0)
    base = flat(untouched(method, head, clients["c0"], offer("c0"), 2))
    for some in (updates, updates[:1], []):
        quiet = flat(still.combine(2, clients, some, offer, offer).content)
        # Σ clipped / (q N), whoever took part
        clipped = [
            change(method, head, clients[u.client], u.content, offer(u.client), 2) for u in some
        ]
        total = sum((c * min(1.0, 0.5 / float(c.norm())) for c in clipped), torch.zeros_like(base))
        torch.testing.assert_close(quiet - base, total / (rate * 3), rtol=1e-6, atol=1e-11)
        noise = flat(loud.combine(2, clients, some, offer, offer).content) - quiet
        wanted = 3.0 * 0.5 / (rate * 3)
        assert len(noise) > 250
        assert abs(float(noise.std()) / wanted - 1) < 4 / math.sqrt(2 * len(noise))
        assert abs(float(noise.mean())) < 4 * wanted / math.sqrt(len(noise))


def test_the_server_clips_again_what_a_client_did_not() -> None:
    method, _, (clients, head, offer) = federation("fedit")
    guard = protection(method, head, clip=0.5)
    base = flat(untouched(method, head, clients["c0"], offer("c0"), 2))
    mean = flat(
        guard.combine(2, clients, moved(method, clients, head, offer, 1e6), offer, offer).content
    )
    assert float((mean - base).norm()) <= 0.5


def test_another_sum_in_the_same_round_has_other_noise() -> None:
    method, _, (clients, head, offer) = federation("fedit")
    guard = protection(method, head, clip=0.5, client_noise=1.0)
    updates = moved(method, clients, head, offer, 1e-3)

    def mean(some: list[Update]) -> torch.Tensor:
        return flat(guard.combine(2, clients, some, offer, offer).content)

    assert torch.equal(mean(updates), mean(updates)), "asked twice it gives the same"
    # were the noise the same, the difference would be the left-out client's own update
    assert float((mean(updates) - mean(updates[:2])).norm()) > 10 * 1e-3 * math.sqrt(400)


def test_clients_are_drawn_each_by_its_own_coin() -> None:
    method, _, (_, head, _) = federation("fedit")
    guard = protection(method, head, 0.3, clip=0.5, client_noise=1.0)
    clients = [f"c{n}" for n in range(50)]
    draws = [guard.select(round, clients) for round in range(1, 201)]
    sizes = torch.tensor([float(len(draw)) for draw in draws])
    assert abs(float(sizes.mean()) - 15) < 4 * math.sqrt(50 * 0.21 / 200)
    assert 6 < float(sizes.var()) < 16, (
        "a draw of fixed size has no variance, coins have N q (1 − q)"
    )
    assert guard.select(3, clients) == draws[2]
    assert guard.select(3, list(reversed(clients))) == list(reversed(draws[2])), (
        "a coin depends on the name alone"
    )


def test_epsilon_is_that_of_the_moments_of_a_gaussian() -> None:
    """Without sampling: RDP α T / (2 z²), turned into (ε, δ) as Canonne, Kamath and Steinke do."""
    for noise, steps, delta in ((1.0, 8, 1e-2), (4.0, 100, 1e-5), (0.5, 3, 1e-3)):
        best = min(
            a * steps / (2 * noise**2)
            + math.log1p(-1 / a)
            - (math.log(delta) + math.log(a)) / (a - 1)
            for a in [1 + n / 100 for n in range(1, 20000)]
        )
        ours = accountant.epsilon(noise, [(1.0, steps)], delta)
        assert ours is not None
        assert best - 1e-9 <= ours <= 1.03 * best
    with_draws = accountant.epsilon(1.0, [(0.1, 8)], 1e-2)
    without = accountant.epsilon(1.0, [(1.0, 8)], 1e-2)
    assert with_draws is not None
    assert without is not None
    assert with_draws < 0.5 * without
    assert accountant.epsilon(0.0, [(1.0, 8)], 1e-2) is None
    assert accountant.epsilon(1.0, [], 1e-2) == 0.0
    assert math.isclose(accountant.default_delta(16), 16**-1.1)


# ------------------------------------------------------------ runs
class Epsilons(Callback):
    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def round_done(self, round: int, summary: Any) -> None:
        self.seen.append(summary["epsilon"])


def private_job(bert: Path, silos: Path, /, **changes: dict[str, Any]) -> Any:
    values: dict[str, dict[str, Any]] = {
        "method": {"name": "fedit", "weights": "uniform"},
        "federation": {"head": "shared"},
        "privacy": {"clip": 0.2, "client_noise": 1.0, "randomness": "seed"},
    }
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    return tiny_job(bert, silos, **values)


def test_a_run_tells_what_it_spent(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    watch = Epsilons()
    run(private_job(tiny_bert, silos), tmp_path / "out", callbacks=[watch])
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["privacy"]["client"]
    assert told["rounds"] == 3
    assert told["delta"] == 3**-1.1
    assert told["epsilon"] == accountant.epsilon(1.0, [(1.0, 3)], 3**-1.1) == watch.seen[-1]
    assert watch.seen == sorted(watch.seen)  # type: ignore[type-var]
    assert watch.seen[0] == accountant.epsilon(1.0, [(1.0, 1)], 3**-1.1)


def from_zero(path: Path) -> float:
    """Norm of the global adapter's B, which starts at zero."""
    tensors = load_file(path / "adapters" / "_global" / "adapter_model.safetensors")
    return math.sqrt(
        sum(float(x.double().norm()) ** 2 for name, x in tensors.items() if "lora_B" in name)
    )


def test_noise_moves_the_model_as_it_says_and_clipping_alone_has_no_epsilon(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    plain = {"clip": 1e9, "client_noise": 0.0}
    for name, privacy in (
        ("plain", plain),
        ("clipped", {**plain, "clip": 0.01}),
        ("noisy", {"client_noise": 5.0}),
    ):
        run(
            private_job(tiny_bert, silos, privacy=privacy, federation={"head": "local"}),
            tmp_path / name,
        )
    # (a shared head is otherwise a mean weighted by examples)
    off = {"clip": None, "client_noise": 0.0}
    without = private_job(tiny_bert, silos, privacy=off, federation={"head": "local"})
    run(without, tmp_path / "off")
    assert "privacy" not in summary(tmp_path / "off")
    assert summary(tmp_path / "plain")["privacy"]["client"]["epsilon"] is None
    losses = {name: lines(tmp_path / name)[-1]["loss"] for name in ("off", "plain")}
    assert math.isclose(losses["off"], losses["plain"], rel_tol=1e-4), (
        "a clip that nobody reaches changes nothing"
    )
    moves = {name: from_zero(tmp_path / name) for name in ("plain", "clipped", "noisy")}
    assert 0 < moves["clipped"] <= 3 * 0.01 < moves["plain"], "three rounds of at most 0.01 each"
    tensors = load_file(tmp_path / "noisy" / "adapters" / "_global" / "adapter_model.safetensors")
    numbers = sum(x.numel() for name, x in tensors.items() if "lora_B" in name)
    expected = (
        5.0 * 0.2 / 3 * math.sqrt(3 * numbers)
    )  # z C / N on each number, in each of three rounds
    assert math.isclose(moves["noisy"], expected, rel_tol=0.15)


def test_a_resumed_run_is_bit_identical_and_draws_by_coins(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = private_job(tiny_bert, silos, federation={"fraction": 0.6}, run={"rounds": 5})
    run(job, tmp_path / "whole")
    trained = [line["round"] for line in lines(tmp_path / "whole") if line["split"] == "train"]
    busy = sorted(set(trained))
    assert len(busy) > 2
    for round in (busy[1], busy[-1]):
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", resume=True, callbacks=[StopAfter(round)])
    run(job, tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "cut")
    assert summary(tmp_path / "whole") == summary(tmp_path / "cut")
    assert len({trained.count(round) for round in range(1, 6)}) > 1, "every round drew as many"


def test_a_round_that_draws_nobody_is_noise_alone(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = private_job(tiny_bert, silos, federation={"fraction": 0.01}, run={"rounds": 1})
    run(job, tmp_path / "out")
    assert not [line for line in lines(tmp_path / "out") if line["split"] == "train"]
    assert summary(tmp_path / "out")["privacy"]["client"]["rounds"] == 1


def test_secret_noise_is_nobody_elses_and_is_kept_for_a_resume(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = private_job(tiny_bert, silos, privacy={"randomness": "secret"}, run={"rounds": 2})
    run(job, tmp_path / "one")
    key = tmp_path / "one" / "privacy.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().strip() not in (tmp_path / "one" / "report.html").read_text()
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "two", callbacks=[StopAfter(2)])
    before = (tmp_path / "two" / "privacy.key").read_text()
    run(job, tmp_path / "two", resume=True)
    assert (tmp_path / "two" / "privacy.key").read_text() == before != key.read_text()
    assert adapters(tmp_path / "one") != adapters(tmp_path / "two")
    key.write_text("no key")
    (tmp_path / "one" / "summary.json").unlink()
    with pytest.raises(RunError, match=r"privacy\.key is no key"):
        run(job, tmp_path / "one", resume=True)


@pytest.mark.parametrize("name", ["ffa-lora", "fedsa-lora", "pf2lora", "fdlora", "fslora"])
def test_every_sum_method_runs_privately(
    name: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    federation: dict[str, Any] = {"ranks": [2, 4, 3]} if name == "fslora" else {}
    if name == "fdlora":
        federation = {"head": "local"}
    job = private_job(
        tiny_bert, silos, method={"name": name}, federation=federation, run={"rounds": 2}
    )
    run(job, tmp_path / "out")
    # the last round of FDLoRA is local: nothing travels, nothing is spent
    assert summary(tmp_path / "out")["privacy"]["client"]["rounds"] == (
        1 if name == "fdlora" else 2
    )


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": {"name": "fedtreelora"}}, "each client's own B"),
    ({"method": {"name": "hilora"}}, "each client's own B"),
    ({"method": {"name": "flora"}}, "own update, not on their sum"),
    ({"method": {"name": "fedalt"}}, "mean of all the others"),
    ({"method": {"name": "local"}}, "sends nothing"),
    ({"method": {"name": "fedit", "weights": "examples"}}, r'method\.weights = "uniform"'),
    ({"method": {"name": "fed-plora"}}, "divides by the number"),
    ({"federation": {"head": "local", "newcomer_head": True}}, "newcomer_head"),
    ({"federation": {"late": "next", "deadline": 5.0}}, r"federation\.late"),
    ({"run": {"noise": True}}, r"run\.noise"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_private_is_refused_before_anything_is_written(
    changes: Any, words: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "method": {"name": "fedit", "weights": "uniform"},
        "federation": {"head": "shared"},
    }
    values |= {"privacy": {"clip": 0.2, "client_noise": 1.0}, **changes}
    with pytest.raises(JobError, match=words) as caught:
        run(tiny_job(tiny_bert, silos, **values), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"client_noise": 1.0}, r"set privacy\.clip"),
        ({"example_noise": 1.0}, r"set privacy\.example_clip"),
        ({"secure_aggregation": True}, r"set privacy\.clip"),
        ({"clip": 0.0}, "above 0"),
        ({"delta": 1.0}, "below 1"),
    ],
)
def test_a_section_that_says_too_little_is_refused(
    section: Any, words: str, tiny_bert: Path, silos: Path
) -> None:
    with pytest.raises(JobError, match=words):
        tiny_job(tiny_bert, silos, privacy=section)


def test_without_the_accountant_one_sentence_says_what_to_install(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accountant.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedgroveError, match=r"dp-accounting.*fedgrove\[privacy\]"):
        run(private_job(tiny_bert, silos), tmp_path / "out")
