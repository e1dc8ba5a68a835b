"""Example level: per-example gradients against a loop and against plain training, the noise, the
count, refusals.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stops import StopAfter
from tests.test_run import adapters, summary
from tests.tiny import sentences, tiny_job, unclipped
from tests.training.test_kernel import CLOCK, TASK, head, start

from fedgrove.adapters import Assembly, Term
from fedgrove.adapters.private import unseal
from fedgrove.ground.errors import JobError
from fedgrove.interop.models import Base, load_base
from fedgrove.job.sections import TrainSection
from fedgrove.methods.contract import Step
from fedgrove.privacy import accountant
from fedgrove.privacy.example_dp import ExampleGuard, norm_of
from fedgrove.privacy.randomness import of_seed
from fedgrove.start import run
from fedgrove.training.kernel import Kernel

KEY = of_seed(1, "test")


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


@pytest.fixture(scope="module")
def examples(base: Base) -> list[dict[str, Any]]:
    return TASK.encode(sentences(12, seed=1), base.processor)


def trained(
    base: Base,
    examples: Any,
    options: TrainSection,
    guard: ExampleGuard | None,
    penalty: Any = None,
) -> Any:
    kernel = Kernel(base, TASK, options)
    try:
        step = Step(Assembly((Term("own", start(base)),), extras=head(base)), penalty=penalty)
        return kernel.train(step, examples, CLOCK, guard)
    finally:
        kernel.close()


def numbers(done: Any) -> torch.Tensor:
    factors = done.adapter("own").values()
    parts = [x.flatten() for f in factors for x in (f.A, f.B)]
    return torch.cat([*parts, *(unseal(e.value).flatten() for e in done.assembly.extras.values())])


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_without_noise_and_clip_it_is_plain_training(
    name: str, penalised: bool, base: Base, examples: Any
) -> None:
    """The whole data as the batch, so that both see the same examples."""

    def tail(live: Any) -> torch.Tensor:
        return 0.3 * torch.stack([f.B.square().sum() for f in live.terms["own"].values()]).sum()

    options = unclipped(
        optimizer=name, lr=0.05 if name == "sgd" else 1e-2, batch_size=12, local_steps=4, clip=0.7
    )
    penalty = tail if penalised else None
    guard = ExampleGuard(math.inf, 0.0, KEY)
    before = numbers(
        trained(base, examples, unclipped(lr=1e-12, batch_size=12, local_steps=1), None)
    )
    plain = numbers(trained(base, examples, options, None, penalty))
    private = numbers(trained(base, examples, options, guard, penalty))
    assert (plain - before).norm() > 1e-3
    assert (private - plain).norm() <= 1e-9 * (plain - before).norm()
    assert guard.spent == [(1.0, 4)]


def test_the_clipped_sum_is_that_of_a_loop_over_examples(base: Base, examples: Any) -> None:
    """One step of SGD with rate 1: what moved is the mean of the gradients, each shortened over all
    leaves together.
    """
    rate, clip = 0.5, 0.2
    options = unclipped(optimizer="sgd", lr=rate, batch_size=12, local_steps=1, clip=0.0)
    nowhere = unclipped(optimizer="sgd", lr=1e-300, batch_size=12, local_steps=1)
    still = numbers(trained(base, examples, nowhere, None))
    single = unclipped(optimizer="sgd", lr=rate, batch_size=1, local_steps=1, clip=0.0)
    total, lengths = torch.zeros_like(still), []
    for example in examples:
        gradient = (still - numbers(trained(base, [example], single, None))) / rate
        lengths.append(float(gradient.norm()))
        total += gradient * min(1.0, clip / lengths[-1])
    assert min(lengths) < max(lengths)
    assert max(lengths) > clip
    moved = numbers(trained(base, examples, options, ExampleGuard(clip, 0.0, KEY))) - still
    torch.testing.assert_close(moved, -rate * total / len(examples), rtol=1e-9, atol=1e-13)


def test_a_leaf_that_an_example_does_not_reach_counts_nothing() -> None:
    leaves = [torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    guard = ExampleGuard(1.0, 0.0, KEY)
    found = guard.step([[torch.tensor([3.0, 4.0, 0.0]).double(), None]], leaves, 1.0)
    torch.testing.assert_close(found[0], torch.tensor([0.6, 0.8, 0.0]).double())
    assert not found[1].any()
    assert math.isclose(norm_of([torch.ones(2, 2), torch.tensor([2.0])]), math.sqrt(8))


@pytest.mark.parametrize("drawn", [0, 3])
def test_the_noise_has_its_deviation_also_where_nobody_was_drawn(drawn: int) -> None:
    leaves = [torch.zeros(300, 20, dtype=torch.float64), torch.zeros(4000, dtype=torch.float64)]
    guard = ExampleGuard(0.5, 2.0, KEY)
    gradients = [[torch.zeros_like(leaf) for leaf in leaves] for _ in range(drawn)]
    found = torch.cat([x.flatten() for x in guard.step(gradients, leaves, 8.0, "a", 1)])
    assert abs(float(found.std()) / (2.0 * 0.5 / 8) - 1) < 0.03
    assert abs(float(found.mean())) < 0.004
    again = torch.cat([x.flatten() for x in guard.step(gradients, leaves, 8.0, "a", 1)])
    other = torch.cat([x.flatten() for x in guard.step(gradients, leaves, 8.0, "a", 2)])
    assert torch.equal(found, again)
    assert float((found * other).mean() / found.var()) < 0.05


def test_examples_are_drawn_each_by_its_own_coin() -> None:
    guard = ExampleGuard(1.0, 1.0, KEY)
    draws = [guard.draw(40, 0.2, round) for round in range(300)]
    sizes = torch.tensor([float(len(draw)) for draw in draws])
    assert abs(float(sizes.mean()) - 8) < 0.6
    assert 4 < float(sizes.var()) < 9  # N q (1 − q) = 6.4; a fixed batch has none
    assert {i for draw in draws for i in draw} == set(range(40))
    assert guard.draw(5, 1.0, 1) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------ runs
def private_job(bert: Path, silos: Path, /, **changes: dict[str, Any]) -> Any:
    section = {
        "example_clip": 0.5,
        "example_noise": 1.0,
        "randomness": "seed",
        **changes.pop("privacy", {}),
    }
    return tiny_job(bert, silos, privacy=section, **changes)


@pytest.mark.parametrize("method", ["fedit", "fedtreelora", "hetlora", "hilora"])
def test_each_client_counts_its_own_and_the_summary_the_largest(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = private_job(tiny_bert, silos, method={"name": method})
    run(job, tmp_path / "out")
    cards = {
        name: json.loads((tmp_path / "out" / "adapters" / name / "fedgrove.json").read_text())[
            "privacy"
        ]
        for name in ("site-0", "site-1", "site-2")
    }
    found = summary(tmp_path / "out")
    for name, card in cards.items():
        n = found["clients"][name]["examples"]
        steps = card["steps"]
        assert steps >= 9
        assert card["epsilon"] == accountant.epsilon(1.0, [(4 / n, steps)], n**-1.1)
    assert len({card["epsilon"] for card in cards.values()}) == 3
    assert found["privacy"]["example"]["epsilon"] == max(card["epsilon"] for card in cards.values())


def test_it_resumes_bit_for_bit_and_fine_tuning_is_counted(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = private_job(
        tiny_bert, silos, train={"final_local_epochs": 1}, federation={"fraction": 0.7}
    )
    run(job, tmp_path / "whole")
    for stop in (StopAfter(1), StopAfter(3)):
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", resume=True, callbacks=[stop])
    run(job, tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "cut")
    assert summary(tmp_path / "whole") == summary(tmp_path / "cut")
    for name in ("site-0", "site-1", "site-2"):
        before, after = (
            json.loads((tmp_path / "whole" / folder / name / "fedgrove.json").read_text())[
                "privacy"
            ]["epsilon"]
            for folder in ("adapters", "adapters_tuned")
        )
        assert after > before


def test_noise_changes_the_model_and_a_secret_key_makes_it_unrepeatable(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    for name, privacy in (
        ("noisy", {}),
        ("same", {}),
        ("still", {"example_noise": 0.0}),
        ("secret", {"randomness": "secret"}),
    ):
        run(private_job(tiny_bert, silos, privacy=privacy, run={"rounds": 1}), tmp_path / name)
    found = {name: adapters(tmp_path / name) for name in ("noisy", "same", "still", "secret")}
    assert found["noisy"] == found["same"]
    assert found["noisy"] != found["still"]
    assert found["noisy"] != found["secret"]
    assert summary(tmp_path / "still")["privacy"]["example"]["epsilon"] is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": {"name": "feddpa-f"}}, "features of some training examples"),
    ({"method": {"name": "fed-hello"}}, "Fisher scores"),
    ({"method": {"name": "fed-plora", "selection": "gradient"}}, "gradients that choose"),
    ({"method": {"name": "hilora"}, "federation": {"held_out": ["site-2"]}}, "probe"),
    ({"run": {"noise": True}}, r"run\.noise"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_reads_examples_beside_its_steps_is_refused(
    changes: Any, words: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=words):
        run(private_job(tiny_bert, silos, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_measuring_step_is_refused_by_the_kernel_too(base: Base, examples: Any) -> None:
    kernel = Kernel(base, TASK, unclipped())
    try:
        for measure in ("fisher", "features"):
            step = Step(Assembly((Term("own", start(base)),)), measure=measure)
            with pytest.raises(JobError, match="without noise"):
                kernel.train(step, examples, CLOCK, ExampleGuard(1.0, 1.0, KEY))
    finally:
        kernel.close()
