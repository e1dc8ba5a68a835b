"""Clients in one batch against the same clients one by one, in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import (
    save_exchanges,
    save_llama,
    save_pictures,
    save_vit,
    sentences,
    tiny_job,
    unclipped,
)
from torch import Tensor

from fedgrove.adapters import Adapter, Assembly, Convex, Extra, Factors, Term, Weighted, fresh
from fedgrove.engines.local import prepare
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base, load_config
from fedgrove.job import Job
from fedgrove.methods.contract import Live, Step
from fedgrove.privacy.example_dp import ExampleGuard
from fedgrove.start import run
from fedgrove.training.cohort import Cohort
from fedgrove.training.cohort_size import size_for
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.lanes import Lanes
from fedgrove.training.live import LiveAssembly
from fedgrove.training.loop import Clock

TASK = ClassifyText(labels=("negative", "positive"), max_length=32)


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


def adapter(base: Base, rank: int, seed: int) -> dict[str, Factors]:
    draw = generator(seed, "B")
    return {
        name: Factors(
            f.A, 0.1 * torch.randn(f.B.shape, generator=draw, dtype=torch.float64), f.scale
        )
        for name, f in fresh(
            base.sites, rank, 0.7, generator(seed, "A"), dtype=torch.float64
        ).items()
    }


def penalty(live: Live) -> Tensor:
    return 0.01 * sum((f.A**2).sum() for f in live.terms["own"].values())  # type: ignore[return-value]


def work(
    base: Base, draw: random.Random, number: int, delta: bool = False, common: Adapter | None = None
) -> Work:
    """A client with its own rank, data, terms, mix and share of the round, and with a
    ``base_delta`` where asked.

    ``common``: a frozen term that is the same object for several clients.
    """
    values = TASK.new_head(base.hidden, generator(number, "head"))
    extras = {f"head.{n}": Extra(v.double()) for n, v in values.items()}
    own = Term(
        "own", adapter(base, draw.choice([1, 2, 5]), number), train=draw.choice(["AB", "B", "A"])
    )
    terms, mix = [own], draw.choice(["sum", "weighted", "convex", "unit", "diagonal"])
    options: dict[str, Any] = (
        {"base_delta": adapter(base, draw.choice([3, 20]), number + 80)} if delta else {}
    )
    if mix in ("weighted", "convex"):
        terms.append(Term("other", adapter(base, 2, number + 50), train="", lr=0.5))
        options["mix"] = Weighted({"other": 0.4}) if mix == "weighted" else Convex("own", "other")
    if mix == "convex":
        gate = torch.tensor(0.2, dtype=torch.float64)
        extras |= {f"lambda.{layer}": Extra(gate, lr=3.0) for layer in base.layers[1:]}
    if mix in ("unit", "diagonal"):
        ranks = {name: f.rank for name, f in own.adapter.items()}
        diagonal = {
            name: torch.linspace(0.5, 1.5, rank, dtype=torch.float64)
            for name, rank in ranks.items()
        }
        terms = [Term("own", own.adapter, train="ABD", diagonal=diagonal, unit=mix == "unit")]
    if common is not None:
        terms.append(Term("common", common, train=""))
    step = Step(
        Assembly(tuple(terms), extras=extras, **options),
        penalty=penalty if draw.random() < 0.3 else None,
        share=draw.choice([1.0, 1.0, 0.5]),
        count=draw.choice([0, 0, 7]),
    )
    rows = sentences(draw.randint(5, 14), seed=number)
    return Work(
        step, TASK.encode(rows, base.processor), Clock(3, (1, f"client-{number}"), 0.2, 0.6)
    )


@pytest.fixture
def kernel(base: Base, request: pytest.FixtureRequest) -> Iterator[Kernel]:
    kernel = Kernel(base, TASK, request.param)
    yield kernel
    kernel.close()


SETTINGS = [
    unclipped(lr=1e-2, batch_size=3, local_steps=4, clip=0.05),
    unclipped(
        lr=1e-2, batch_size=4, local_steps=3, accumulation=2, schedule="cosine", weight_decay=0.1
    ),
    unclipped(
        lr=0.2,
        optimizer="sgd",
        momentum=0.9,
        batch_size=2,
        local_steps=5,
        head_lr=0.05,
        warmup_fraction=0.3,
    ),
    unclipped(lr=1e-2, batch_size=5, local_steps=None, local_epochs=1, clip=1.0),
]


@pytest.mark.parametrize(
    "kernel", SETTINGS, indirect=True, ids=["clip", "accumulate", "sgd", "epochs"]
)
@pytest.mark.parametrize("deltas", [False, True], ids=["terms", "deltas"])
@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_together_is_as_alone(base: Base, kernel: Kernel, deltas: bool, packs: bool) -> None:
    kernel.hooked.packs = packs
    draw = random.Random(f"{deltas}{packs}")
    for trial in range(5):
        count = draw.randint(2, 4)
        common = adapter(base, 2, trial + 200) if trial % 2 else None
        works = [
            work(
                base,
                draw,
                10 * trial + number,
                deltas and number != 1,
                common if number != 1 else None,
            )
            for number in range(count)
        ]
        together = Lanes([kernel]).train(works)
        for each, ours in zip(works, together, strict=True):
            alone = kernel.train(each.step, each.examples, each.clock)
            assert ours.steps == alone.steps
            assert ours.loss == pytest.approx(alone.loss, abs=1e-9)
            moved = 0.0
            for before, theirs, mine in zip(
                tensors(each.step.assembly),
                tensors(alone.assembly),
                tensors(ours.assembly),
                strict=True,
            ):
                change = float((theirs - before).norm())
                moved += change
                assert float((mine - theirs).norm()) <= 1e-9 * max(change, 1e-6)
            assert moved > 1e-3, "nothing trained, so equality would mean nothing"


def tensors(assembly: Assembly) -> list[Tensor]:
    found = [
        getattr(f, letter)
        for term in assembly.terms
        for f in term.adapter.values()
        for letter in "AB"
    ]
    found += [d for term in assembly.terms for d in (term.diagonal or {}).values()]
    found += [extra.value for extra in assembly.extras.values()]
    return [tensor.as_subclass(Tensor) for tensor in found]


@pytest.mark.parametrize("kernel", SETTINGS[:1], indirect=True)
def test_steps_that_do_not_fit_run_alone(base: Base, kernel: Kernel) -> None:
    draw = random.Random(0)
    works = [work(base, draw, number) for number in range(3)]
    first = works[0].step
    odd = Work(
        Step(Assembly(first.assembly.terms, extras=first.assembly.extras, layers=frozenset({0}))),
        works[0].examples,
        works[0].clock,
    )
    examples, clock = works[0].examples, works[0].clock
    assert kernel.joins(works[0])
    assert not kernel.joins(odd)
    assert not kernel.joins(Work(first, examples, clock, guard=ExampleGuard(1.0, 1.0, "key")))
    assert not kernel.joins(Work(Step(first.assembly, measure="fisher"), examples, clock))
    assert not kernel.joins(Work(Step(first.assembly.frozen()), examples, clock))
    done = Lanes([kernel]).train([odd, *works[1:]])
    alone = kernel.train(odd.step, odd.examples, odd.clock)
    for ours, theirs in zip(tensors(done[0].assembly), tensors(alone.assembly), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel", SETTINGS[:1], indirect=True, ids=["clip"])
def test_frozen_factors_in_common_are_multiplied_once(base: Base, kernel: Kernel) -> None:
    shared, twin = adapter(base, 3, 1), adapter(base, 3, 1)
    terms = [
        (Term("root", shared, train=""), Term("own", adapter(base, 2, 5))),
        (
            Term("root", twin, train=""),
            Term("own", adapter(base, 2, 6)),
        ),  # equal numbers, but of its own
        (Term("root", shared, train=""), Term("own", adapter(base, 1, 7))),
        (Term("root", shared),),  # it trains there
    ]
    lives = [
        LiveAssembly(Assembly(each), device=torch.device("cpu"), dtype=torch.float64, train=True)
        for each in terms
    ]
    site = next(iter(base.sites.values()))
    x = torch.randn(7, 4, site.in_features, dtype=torch.float64, generator=generator(0, "x"))
    output = torch.zeros(7, 4, site.out_features, dtype=torch.float64)
    cohort = Cohort(lives, [2, 1, 3, 1])
    found = cohort.add(site, x, output)
    (blocks,) = cohort._masks
    assert sorted(blocks) == sorted(
        [(3, (0, 2)), (2, (0,)), (3, (1,)), (2, (1,)), (1, (2,)), (3, (3,))]
    )
    parts = zip(lives, x.split([2, 1, 3, 1]), output.split([2, 1, 3, 1]), strict=True)
    assert torch.allclose(
        found, torch.cat([live.add(site, own, out) for live, own, out in parts]), atol=1e-12
    )


def test_the_size_follows_the_device_the_batch_and_the_memory() -> None:
    small = {
        "clients": 16,
        "tokens": 1000,
        "token_bytes": 1000,
        "client_bytes": 500_000,
        "memory": 10**9,
    }
    asked: dict[str, Any] = {**small, "share": 0.01}
    assert size_for(device="cpu", batch_size=16, **asked) == 8
    assert size_for(device="cpu", batch_size=8, **asked) == 16
    assert size_for(device="cpu", batch_size=128, **asked) == 1
    assert size_for(device="cpu", batch_size=8, lanes=2, **asked) == 8
    assert size_for(device="cpu", batch_size=2, **{**asked, "clients": 1000}) == 16
    assert (
        size_for(device="cuda", batch_size=2, **{**asked, "clients": 1000, "share": 0.001}) == 128
    )
    assert size_for(device="cpu", batch_size=8, **{**asked, "share": 0.2}) == 5
    assert size_for(device="cpu", batch_size=8, **{**asked, "share": 3.0}) == 1
    assert size_for(device="cuda", batch_size=2, **asked) == 16
    assert size_for(device="cuda", batch_size=2, **{**asked, "memory": 5 * 10**6}) == 3
    assert size_for(device="cuda", batch_size=2, **{**asked, "memory": 1}) == 1


def test_a_run_with_cohorts_is_the_run_without(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FedTreeLoRA has a mix, private terms, extras and several steps in a round: courses in
    lockstep.
    """
    results, sizes = {}, []
    losses = Kernel.losses

    def counted(kernel: Kernel, lives: Any, *rest: Any, together: bool) -> Any:
        if together:
            sizes.append(len(lives))
        return losses(kernel, lives, *rest, together=together)

    monkeypatch.setattr(Kernel, "losses", counted)
    for size in (1, 3):
        sizes.clear()
        job = tiny_job(
            tiny_bert,
            silos,
            method={"name": "fedtreelora"},
            train={"cohort": size, "batch_size": 2},
            run={"rounds": 2},
        )
        results[size] = run(job, tmp_path / str(size)).summary["clients"]
    for name, row in results[1].items():
        assert results[3][name]["loss"] == pytest.approx(row["loss"], abs=2e-3)
    assert set(sizes) == {3}


def test_the_size_is_chosen_once_and_bounded_by_the_memory(tiny_bert: Path, silos: Path) -> None:
    def chosen(**train: Any) -> Any:
        return prepare(
            tiny_job(tiny_bert, silos, train={"batch_size": 8, **train})
        ).job.train.cohort

    assert chosen() == 3  # 16 batches of 8 keep a CPU busy, and there are 3 clients
    assert chosen(batch_size=128) == 1
    assert chosen(memory="1MB") == 1
    assert chosen(cohort=2) == 2
    assert chosen(threads=2) == 2  # in each of two lanes, and there are 3 clients


def test_the_memory_of_images_is_that_of_their_patches_and_of_a_language_model_that_of_its_logits(
    tmp_path: Path,
) -> None:
    def chosen(model: Path, path: Path, memory: str, *settings: str) -> Any:
        own = [
            f"model.name={model}",
            "data.source=silos",
            f"data.path={path}",
            "lora.rank=4",
            "train.batch_size=2",
        ]
        job = Job().override(
            [*own, "train.dtype=float32", "train.threads=1", f"train.memory={memory}", *settings]
        )
        return prepare(job).job.train.cohort

    images = save_vit(tmp_path / "vit"), save_pictures(tmp_path / "pictures")
    assert chosen(*images, "0.6MB", "data.task=classify-images") == 3, (
        "17 tokens, not the 128 of a text"
    )
    assert chosen(*images, "0.3MB", "data.task=classify-images") == 1
    texts = save_llama(tmp_path / "llama"), save_exchanges(tmp_path / "exchanges")
    task = "data.task=generate", "data.max_length=64"
    vocabulary = load_config(str(texts[0])).vocab_size
    activations = 2 * 64 * 2 * (16 * 32 + 2 * 4 * 64) * 4
    logits = 2 * 64 * 12 * vocabulary
    assert chosen(*texts, f"{3 * (activations + logits) / 1e6 + 1:.3f}MB", *task) == 3
    assert chosen(*texts, f"{3 * activations / 1e6:.3f}MB", *task) < 3, (
        "without room for the logits"
    )


@pytest.mark.parametrize("delta", [False, True])
def test_where_nothing_trains_all_terms_are_one_product_with_the_same_sum(
    base: Base, delta: bool
) -> None:
    draw = random.Random(4)
    x = torch.randn(2, 7, base.hidden, dtype=torch.float64, generator=generator(0, "x"))
    changed = 0.0
    for number in range(12):
        assembly = work(base, draw, number, delta, adapter(base, 2, 99)).step.assembly
        live = LiveAssembly(assembly, device=base.device, dtype=torch.float64, train=False)
        for site in base.sites.values():
            output = torch.randn(
                2, 7, site.out_features, dtype=torch.float64, generator=generator(number, site.name)
            )
            with torch.enable_grad():
                term_by_term = live.add(site, x, output)
            for given in (
                output.clone(),
                output.transpose(0, 1).contiguous().transpose(0, 1),
            ):  # then from what was kept
                with torch.inference_mode():
                    at_once = live.add(site, x, given)
                assert torch.allclose(at_once, term_by_term, rtol=0, atol=1e-12)
            changed = max(changed, float((term_by_term - output).norm()))
    assert changed > 0.1, "terms that add nothing would show nothing"
