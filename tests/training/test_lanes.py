"""Lanes: the numbers of one kernel in one thread, from two at the same time, on one copy of the
weights.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.tiny import sentences, tiny_job, unclipped

from fedgrove.adapters import Assembly, Factors
from fedgrove.engines.local import prepare
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.interop.models import Base, load_base
from fedgrove.start import run
from fedgrove.training import profile
from fedgrove.training.kernel import Kernel
from fedgrove.training.lanes import Lanes, lane_count, twin

TASK = ClassifyText(labels=("negative", "positive"), max_length=32)


@pytest.fixture
def threads() -> Iterator[None]:
    """The process's threads afterwards as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert))


@pytest.fixture
def lanes(tiny_bert: Path, threads: None) -> Lanes:
    torch.set_num_threads(2)
    return Lanes.on(load_base(str(tiny_bert)), TASK, unclipped(), count=2, threads=2)


def written(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for part in ("adapters", "adapters_tuned")
        for file in sorted((folder / part).rglob("*.safetensors"))
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "fedtreelora"}},
        {"method": {"name": "flora"}},  # folds updates into the base
        {
            "method": {"name": "hilora"},
            "federation": {"held_out": ["site-1"]},
        },  # measures, and takes a newcomer in
        {"privacy": {"example_clip": 1.0, "example_noise": 0.5, "randomness": "seed"}},
    ],
    ids=["fedtreelora", "flora", "hilora", "example-dp"],
)
def test_at_the_same_time_is_one_after_the_other(
    changes: dict[str, Any],
    tiny_bert: Path,
    silos: Path,
    tmp_path: Path,
    threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = {"threads": 2, "cohort": 2, "batch_size": 2, "final_local_epochs": 1}
    job = tiny_job(tiny_bert, silos, **changes, train=train, run={"rounds": 3})
    results = {}
    for name in ("together", "in turn"):
        if name == "in turn":
            monkeypatch.setattr(Lanes, "map", in_turn)
        done = run(job, tmp_path / name)
        lines = [
            {key: value for key, value in line.items() if key != "seconds"}
            for line in done.metrics()
        ]
        results[name] = written(done.path), str(lines), done.summary["clients"]
    assert len(results["together"][0]) >= 6
    assert results["together"] == results["in turn"]


def in_turn(lanes: Lanes, work: Any, items: Any) -> Iterator[Any]:
    """All items on the first lane, in this thread alone."""
    assert len(lanes.kernels) in (1, 2)
    torch.set_num_threads(1)
    for item in items:
        yield work(lanes.kernels[0], item)
    torch.set_num_threads(lanes.threads)


def test_a_job_has_lanes_where_they_were_measured_to_pay(tiny_bert: Path, silos: Path) -> None:
    def count(**changes: dict[str, Any]) -> int:
        return lane_count(tiny_job(tiny_bert, silos, **changes))

    assert count(train={"threads": 2, "cohort": 4}) == 2
    assert count(train={"threads": 16, "cohort": 4}) == 2
    assert count(train={"threads": 1, "cohort": 4}) == 1
    assert count(train={"threads": 2, "cohort": 1}) == 1, (
        "one client at a time is what was asked for"
    )
    assert count(train={"threads": 2, "device": "cuda"}) == 1
    assert count(train={"threads": 2, "cohort": 4}, lora={"rank": 2, "dropout": 0.1}) == 1


@pytest.mark.parametrize(
    ("train", "clients", "cohort", "count"),
    [
        ({}, 3, 2, 2),
        ({}, 2, 2, 2),  # one in each lane
        ({"batch_size": 128}, 3, 1, 1),
        ({"memory": "1MB"}, 3, 1, 1),
        ({"cohort": 1}, 3, 1, 1),
        ({"cohort": 3}, 3, 3, 2),
    ],
)
def test_a_resumed_run_has_the_lanes_of_its_beginning(
    train: dict[str, Any],
    clients: int,
    cohort: int,
    count: int,
    tiny_bert: Path,
    silos: Path,
    threads: None,
) -> None:
    held_out = {"held_out": ["site-2"]} if clients == 2 else {}
    job = tiny_job(tiny_bert, silos, train={"threads": 2, **train}, federation=held_out)
    first = prepare(job)
    again = prepare(first.job)  # job.toml has every choice written out
    assert (first.job.train.cohort, len(first.engine.half.lanes.kernels)) == (cohort, count)
    assert (again.job.train.cohort, len(again.engine.half.lanes.kernels)) == (cohort, count)


def test_the_weights_are_there_once(lanes: Lanes) -> None:
    first, second = (kernel.base.model for kernel in lanes.kernels)
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert pairs
    for one, other in pairs:
        assert one is not other
        assert one.data_ptr() == other.data_ptr()
    modules = zip(first.modules(), second.modules(), strict=True)
    assert all(one is not other for one, other in modules)
    assert first.config is not second.config


def test_what_a_lane_folds_is_its_own(lanes: Lanes, base: Base) -> None:
    name, site = next(iter(base.sites.items()))
    factors = Factors(torch.ones(1, site.in_features), torch.ones(site.out_features, 1), 1.0)
    examples = TASK.encode(sentences(4, seed=0), base.processor)
    first, second = lanes.kernels
    with first.opened(Assembly(folded={name: factors}), train=False):
        assert not torch.equal(
            first.base.model.get_submodule(name).weight, base.model.get_submodule(name).weight
        )
        assert torch.equal(
            second.base.model.get_submodule(name).weight, base.model.get_submodule(name).weight
        )
        assert torch.equal(
            second.features(examples), Kernel(base, TASK, unclipped()).features(examples)
        )


def test_tied_weights_stay_tied(tiny_bert: Path) -> None:
    base = load_base(str(tiny_bert))
    layers = base.model.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    other = twin(base).model.encoder.layer
    assert other[1].output.dense.weight is other[0].output.dense.weight


def test_both_lanes_work_at_once_and_answers_keep_their_order(lanes: Lanes) -> None:
    meeting = threading.Barrier(2, timeout=20)  # breaks unless two are inside together

    def work(kernel: Kernel, item: int) -> tuple[int, int, int]:
        meeting.wait()
        return item, lanes.kernels.index(kernel), torch.get_num_threads()

    found = list(lanes.map(work, range(8)))
    assert [item for item, _, _ in found] == list(range(8))
    assert {lane for _, lane, _ in found} == {0, 1}
    assert {count for _, _, count in found} == {1}, "each has an equal share of the two threads"
    assert torch.get_num_threads() == 2


def test_items_are_drawn_as_they_are_needed(lanes: Lanes) -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            # made with as many threads whoever works beside it: the first two before anybody does
            assert torch.get_num_threads() == (2 if number < 2 else 1)
            yield number

    found = lanes.map(lambda kernel, item: item, items())
    assert next(found) == 0
    assert len(drawn) <= 4
    cast("Generator[int]", found).close()
    assert len(drawn) <= 4
    assert torch.get_num_threads() == 2


def test_one_item_has_all_threads(lanes: Lanes) -> None:
    assert list(lanes.map(lambda kernel, item: (item, torch.get_num_threads()), [7])) == [(7, 2)]
    assert list(lanes.map(lambda kernel, item: item, [])) == []


def test_what_goes_wrong_in_a_lane_is_raised_and_nothing_more_begins(lanes: Lanes) -> None:
    begun: list[int] = []

    def work(kernel: Kernel, item: int) -> int:
        begun.append(item)
        if item == 1:
            raise ValueError("item 1")
        return item

    with pytest.raises(ValueError, match="item 1"):
        list(lanes.map(work, range(100)))
    assert len(begun) <= 6
    assert list(lanes.map(lambda kernel, item: item, range(3))) == [0, 1, 2], (
        "the lanes are free again"
    )


def test_whoever_stops_listening_waits_for_a_batch_and_no_more(lanes: Lanes, base: Base) -> None:
    examples = TASK.encode(sentences(4, seed=0), base.processor)
    batches = 0

    def work(kernel: Kernel, item: int) -> None:
        nonlocal batches
        while item:  # the first item is done at once, the others never
            kernel.features(examples)
            batches += 1

    found = lanes.map(work, range(3))
    next(found)
    with pytest.raises(KeyboardInterrupt):
        cast("Generator[int]", found).throw(KeyboardInterrupt)
    assert not any(kernel.halt.is_set() for kernel in lanes.kernels)
    assert lanes.kernels[0].features(examples).shape == (4, base.hidden)


def test_a_profile_counts_lanes_as_their_share(lanes: Lanes) -> None:
    meeting = threading.Barrier(2, timeout=20)

    def work(kernel: Kernel, item: int) -> None:
        with profile.span("forward"):
            meeting.wait()

    with profile.profiling() as recorded, profile.span("training"):
        list(lanes.map(work, range(4)))
    assert set(recorded.total) == {"training", "training/forward"}
    assert recorded.total["training/forward"] <= recorded.total["training"]


def test_a_prepared_job_has_its_lanes(tiny_bert: Path, silos: Path, threads: None) -> None:
    prepared = prepare(tiny_job(tiny_bert, silos, train={"threads": 2}))
    assert len(prepared.engine.half.lanes.kernels) == 2
    assert prepared.engine.half.kernel is prepared.engine.half.lanes.kernels[0]
    alone = prepared.engine.half.alone(prepared.engine.half.lanes.kernels[1])
    assert alone.kernel is prepared.engine.half.lanes.kernels[1]
    assert alone.lanes.kernels == [alone.kernel]
    assert alone._measured is prepared.engine.half._measured, (
        "what one lane measured another need not"
    )
