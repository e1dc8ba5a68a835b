"""Fed-PLoRA against a dense float64 reference, its identities, its selections, and what it
sends.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.kit import aggregated
from tests.stops import StopAfter
from tests.tiny import save_silos, sentences, tiny_job, unclipped
from torch import Tensor

from fedgrove.adapters import Adapter, Assembly, Factors, Site, as_one_adapter
from fedgrove.adapters.adapter import fresh
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.ground.errors import JobError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import Base, load_base
from fedgrove.job.sections import TrainSection
from fedgrove.methods.contract import ClientInfo, Setting, Step, Trained, Update, WeightedOptions
from fedgrove.methods.fed_plora import Counts, FedPLoRA, PLoRAOptions, best
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.records import Whole
from fedgrove.start import run
from fedgrove.tracking.metrics import read
from fedgrove.training.kernel import Kernel
from fedgrove.training.loop import Clock

RANK = 4
SITES = {"q": Site("q", 0, 5, 7), "v": Site("v", 1, 8, 6)}  # in, out
CLOCK = Clock(7, (1, "client"))


def method(
    rank: int = RANK, sites: Any = SITES, scaling: Any = "global", seed: int = 3, **options: Any
) -> FedPLoRA:
    setting = Setting(
        sites=sites, rank=rank, alpha=rank * 4 / 3, rounds=3, seed=seed, scaling=scaling
    )
    return FedPLoRA(PLoRAOptions(**options), setting)


def draw(
    seed: int, rank: int, sites: Any = SITES, scale: float = 4 / 3, stretch: float = 1.0
) -> Adapter:
    noise = generator(seed, "adapter")
    return {
        name: Factors(
            stretch * torch.randn(rank, site.in_features, generator=noise, dtype=torch.float64),
            torch.randn(site.out_features, rank, generator=noise, dtype=torch.float64) / stretch,
            scale,
        )
        for name, site in sites.items()
    }


def steps(
    chosen: FedPLoRA, client: ClientInfo, offer: Any, mine: Any, round: int
) -> tuple[Step, Any]:
    """The training step of a plan that measures nothing first, and what the client sends if nothing
    moves.
    """
    (step,) = list(chosen.plan(client, offer, mine, round))
    sent, kept = chosen.report(client, [Trained(step.assembly, 0.0, 1)], offer, mine, round)
    return step, (sent, kept)


# ------------------------------------------------------------ aggregation
CHOSEN = st.lists(st.sets(st.integers(0, RANK - 1), min_size=1).map(sorted), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), chosen=CHOSEN, stretch=st.sampled_from([1.0, 1e-4, 1e5]))
def test_aggregation_is_the_mean_of_each_index(
    seed: int, chosen: list[list[int]], stretch: float
) -> None:
    """One outer product at a time, mixed ranks, indices that nobody holds."""
    before = draw(seed, RANK)
    sent = [draw(seed + 1 + n, len(own), stretch=stretch) for n, own in enumerate(chosen)]
    updates = [
        Update(
            f"c{n}", 10 ** (n % 3), {"modules": modules, "indices": own}
        )  # the number of examples does not matter
        for n, (modules, own) in enumerate(zip(sent, chosen, strict=True))
    ]
    after = aggregated(method(), Whole(before), 1, updates).whole
    for site in SITES:
        assert after[site].scale == before[site].scale
        for j in range(RANK):
            mine = [
                (m[site], own.index(j)) for m, own in zip(sent, chosen, strict=True) if j in own
            ]
            if not mine:
                assert torch.equal(after[site].A[j], before[site].A[j])
                assert torch.equal(after[site].B[:, j], before[site].B[:, j])
                continue
            a = sum((f.A[row] for f, row in mine), torch.zeros(())) / len(mine)
            b = sum((f.B[:, row] for f, row in mine), torch.zeros(())) / len(mine)
            torch.testing.assert_close(after[site].A[j], a, rtol=1e-12, atol=1e-12 * stretch)
            torch.testing.assert_close(after[site].B[:, j], b, rtol=1e-12, atol=1e-12 / stretch)


def test_indices_may_differ_from_site_to_site() -> None:
    before, first, second = draw(0, RANK), draw(1, 1), draw(2, 2)
    updates = [
        Update("a", 1, {"modules": first, "indices": {"q": [3], "v": [0]}}),
        Update("b", 1, {"modules": second, "indices": {"q": [2, 3], "v": [1, 2]}}),
    ]
    after = aggregated(method(), Whole(before), 1, updates).whole
    torch.testing.assert_close(after["q"].A[3], (first["q"].A[0] + second["q"].A[1]) / 2)
    torch.testing.assert_close(after["v"].A[0], first["v"].A[0])
    assert torch.equal(after["v"].A[3], before["v"].A[3])


def test_the_full_mean_is_fedits_for_any_number_of_clients() -> None:
    """49 is the first number whose reciprocal, taken so many times, does not add up to 1."""
    ours = method()
    theirs = FedIT(WeightedOptions(weights="uniform"), ours.setting)
    for count in (1, 3, 49, 98):
        sent = [draw(n, RANK) for n in range(count)]  # float64: float32 would hide the last bit
        tagged = [
            Update(f"c{n}", 1 + n, {"modules": m, "indices": [0, 1, 2, 3]})
            for n, m in enumerate(sent)
        ]
        plain = [Update(f"c{n}", 1 + n, {"adapter": m}) for n, m in enumerate(sent)]
        mine = aggregated(ours, Whole(sent[0]), 1, tagged).whole
        for site, factors in aggregated(theirs, {"whole": {}}, 1, plain).whole.items():
            assert torch.equal(mine[site].A, factors.A)
            assert torch.equal(mine[site].B, factors.B)


# ------------------------------------------------------------ select-N-fold
@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> Base:
    return load_base(str(tiny_bert), dtype=torch.float64)


TASK = ClassifyText(labels=("negative", "positive"), max_length=32)


@pytest.fixture(scope="module")
def examples(base: Base) -> list[dict[str, Any]]:
    return TASK.encode(sentences(16, seed=1), base.processor)


def with_head(base: Base, assembly: Assembly) -> Assembly:
    from fedgrove.adapters import Extra

    head = TASK.new_head(base.hidden, generator(3, "head"))
    return assembly.with_extras(
        {f"head.{name}": Extra(value.double()) for name, value in head.items()}
    )


def trained_by(base: Base, examples: Any, step: Step, options: TrainSection) -> Trained:
    from dataclasses import replace

    kernel = Kernel(base, TASK, options)
    try:
        return kernel.train(replace(step, assembly=with_head(base, step.assembly)), examples, CLOCK)
    finally:
        kernel.close()


@pytest.mark.parametrize("folding", ["side", "dense"])
def test_a_client_starts_from_exactly_the_global_model(
    base: Base, examples: Any, folding: str
) -> None:
    chosen = method(sites=base.sites, folding=folding)
    offer = Whole(draw(1, RANK, base.sites, stretch=0.3))
    kernel = Kernel(base, TASK, unclipped())
    try:
        whole = kernel.logits(
            with_head(base, chosen.personal(ClientInfo("c", 2, 9), offer, Counts())), examples
        )
        nothing = kernel.logits(with_head(base, Assembly()), examples)
        assert (whole - nothing).norm() > 0.1 * nothing.norm()
        for rank in (1, 2, RANK):
            step, _ = steps(chosen, ClientInfo("c", rank, 9), offer, Counts(), 1)
            (term,) = step.assembly.terms  # one dense LoRA of the client's rank, whatever is folded
            assert {f.rank for f in term.adapter.values()} == {rank}
            torch.testing.assert_close(
                kernel.logits(with_head(base, step.assembly), examples), whole, rtol=0, atol=1e-10
            )
            for site, factors in as_one_adapter(step.assembly, base.sites).items():
                torch.testing.assert_close(factors.product(), offer.whole[site].product())
    finally:
        kernel.close()


@pytest.mark.parametrize(
    "options",
    [
        unclipped(lr=1e-2, weight_decay=0.5, batch_size=4, local_steps=5),
        unclipped(
            optimizer="sgd", lr=0.3, momentum=0.9, weight_decay=0.1, batch_size=4, local_steps=5
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_both_foldings_train_alike_and_move_nothing_but_the_selected(
    base: Base, examples: Any, options: Any
) -> None:
    offer = Whole(draw(1, RANK, base.sites, stretch=0.3))
    found: dict[str, Any] = {}
    for folding in ("side", "dense"):
        chosen = method(sites=base.sites, folding=folding)
        client = ClientInfo("c", 2, 9)
        (step,) = list(chosen.plan(client, offer, Counts(), 1))
        trained = trained_by(base, examples, step, options)
        sent, _ = chosen.report(client, [trained], offer, Counts(), 1)
        found[folding] = sent
        frozen = trained.assembly.base_delta if folding == "side" else trained.assembly.folded
        others = [j for j in range(RANK) if j not in sent.indices]
        for site, factors in (frozen or {}).items():
            assert torch.equal(factors.A, offer.whole[site].A[others])
            assert torch.equal(factors.B, offer.whole[site].B[:, others])
        assert frozen
    assert found["side"].indices == found["dense"].indices
    for site, factors in found["side"].modules.items():
        moved = (factors.A - offer.whole[site].A[found["side"].indices]).norm()
        assert moved > 1e-4
        assert (factors.A - found["dense"].modules[site].A).norm() < 1e-8 * moved
        assert (factors.B - found["dense"].modules[site].B).norm() < 1e-8


def test_the_upload_is_the_selected_modules_in_ascending_order() -> None:
    chosen, offer = method(), Whole(draw(1, RANK))
    for round in range(1, 9):
        _, (sent, kept) = steps(chosen, ClientInfo("c", 3, 9), offer, Counts(), round)
        assert kept.counts == {}
        assert sent.indices == sorted(set(sent.indices))
        assert len(sent.indices) == 3
        for site, factors in sent.modules.items():
            assert torch.equal(factors.A, offer.whole[site].A[sent.indices])
            assert torch.equal(factors.B, offer.whole[site].B[:, sent.indices])
            assert factors.scale == 4 / 3


def test_a_client_with_the_full_budget_folds_nothing() -> None:
    for selection in ("random", "magnitude", "gradient", "least_trained"):
        chosen = method(selection=selection)
        step, (sent, _) = steps(chosen, ClientInfo("c", RANK, 9), Whole(draw(1, RANK)), Counts(), 1)
        assert step.measure == "train"
        assert step.assembly.base_delta is None
        assert step.assembly.folded is None
        assert sent.indices == list(range(RANK))


def test_a_client_scale_is_refused_unless_it_is_the_global_one() -> None:
    clients = [ClientInfo("a", RANK, 1), ClientInfo("b", 2, 1)]
    method().check(clients)
    method(scaling="client").check(clients[:1])
    with pytest.raises(
        JobError, match=r'lora\.scaling = "client" gives b the scale alpha / 2.*alpha / 4'
    ):
        method(scaling="client").check(clients)


# ------------------------------------------------------------ selections
def indices(
    chosen: FedPLoRA,
    round: int,
    client: str = "c",
    rank: int = 2,
    mine: Any = None,
    offer: Any = None,
) -> Any:
    offer = offer or Whole(draw(1, RANK))
    return steps(chosen, ClientInfo(client, rank, 9), offer, mine or Counts(), round)[1][0].indices


def test_random_is_a_uniform_draw_for_each_round_and_client() -> None:
    chosen = method()
    pairs = Counter(tuple(indices(chosen, round)) for round in range(300))
    assert len(pairs) == 6  # every pair of 4
    assert max(pairs.values()) < 90  # 50 expected, standard deviation 6.5
    assert min(pairs.values()) > 20
    assert [indices(chosen, r, "c") for r in range(20)] != [
        indices(chosen, r, "d") for r in range(20)
    ]
    assert [indices(chosen, r) for r in range(20)] == [indices(method(), r) for r in range(20)]
    assert [indices(chosen, r) for r in range(20)] != [
        indices(method(seed=4), r) for r in range(20)
    ]


def test_per_site_draws_for_each_site() -> None:
    found = [indices(method(per_site=True), round) for round in range(30)]
    assert all(
        set(each) == set(SITES) and all(len(own) == 2 for own in each.values()) for each in found
    )
    assert sum(each["q"] == each["v"] for each in found) < 15  # 1 in 6 expected


def test_magnitude_takes_the_largest_updates() -> None:
    whole = draw(1, RANK)
    size = {
        s: [float(torch.outer(f.B[:, j], f.A[j]).norm()) for j in range(RANK)]
        for s, f in whole.items()
    }
    total = [sum(size[s][j] ** 2 for s in SITES) for j in range(RANK)]
    offer = Whole(whole)
    for rank in (1, 2, 3):
        largest = sorted(sorted(range(RANK), key=lambda j: -total[j])[:rank])
        assert {
            tuple(indices(method(selection="magnitude"), r, rank=rank, offer=offer))
            for r in range(5)
        } == {tuple(largest)}
        by_site = indices(method(selection="magnitude", per_site=True), 1, rank=rank, offer=offer)
        assert by_site == {
            s: sorted(sorted(range(RANK), key=lambda j: -size[s][j])[:rank]) for s in SITES
        }


def test_equal_scores_are_drawn() -> None:
    # B = 0: every module is of size zero
    nothing = Whole(fresh(SITES, RANK, 4 / 3, generator(0, "x")))
    found = Counter(
        tuple(indices(method(selection="magnitude"), round, offer=nothing)) for round in range(60)
    )
    assert len(found) == 6
    score = torch.tensor([1.0, 5.0, 1.0, 1.0, 5.0])
    assert {tuple(best(score, 3, generator(n, "x"))) for n in range(40)} == {
        (0, 1, 4),
        (1, 2, 4),
        (1, 3, 4),
    }


def test_gradient_takes_the_largest_gradients_and_magnitude_does_not(
    base: Base, examples: Any
) -> None:
    """Module 1 is of size zero with a large gradient, 2 small with a small gradient, 0 and 3 zero
    without any.
    """
    whole = {}
    for site, f in draw(1, RANK, base.sites).items():
        keep_a, keep_b = (
            torch.tensor([0.0, 1.0, 1e-3, 0.0]).double(),
            torch.tensor([0.0, 0.0, 1e-3, 0.0]).double(),
        )
        whole[site] = Factors(f.A * keep_a[:, None], f.B * keep_b, f.scale)
    offer, client = Whole(whole), ClientInfo("c", 1, 16)
    chosen = method(sites=base.sites, selection="gradient", batches=3)
    plan = chosen.plan(client, offer, Counts(), 1)
    look = next(plan)
    assert (look.measure, look.count, look.head) == ("fisher", 3, False)
    assert look.assembly.base_delta is None
    looked = trained_by(base, examples, look, unclipped(batch_size=4))
    step = plan.send(looked)
    sent, _ = chosen.report(client, [looked, Trained(step.assembly, 0.0, 1)], offer, Counts(), 1)
    assert sent.indices == [1]
    assert indices(method(sites=base.sites, selection="magnitude"), 1, rank=1, offer=offer) == [2]


def test_least_trained_takes_turns_by_the_clients_own_count() -> None:
    for per_site in (False, True):
        chosen, offer = (
            method(rank=5, selection="least_trained", per_site=per_site),
            Whole(draw(1, 5)),
        )
        mine = Counts()
        counts: dict[str, Counter[int]] = {site: Counter() for site in SITES}
        for round in range(1, 11):
            _, (sent, mine) = steps(chosen, ClientInfo("c", 2, 9), offer, mine, round)
            for site in SITES:
                counts[site].update(sent.indices[site] if per_site else sent.indices)
                found = [counts[site][j] for j in range(5)]
                assert max(found) - min(found) <= 1
        assert [counts["q"][j] for j in range(5)] == [4] * 5
    drawn = Counter(
        j for round in range(1, 11) for j in indices(method(rank=5), round, offer=Whole(draw(1, 5)))
    )
    assert max(drawn.values()) - min(drawn.values()) > 1  # which chance does not do


# ------------------------------------------------------------ whole runs
MIXED: dict[str, Any] = {"federation": {"ranks": [1, 2, 4, 3]}, "lora": {"rank": 4}}


def files(path: Path) -> dict[str, bytes]:
    """Every exported file; the card names the method, so it is left out."""
    found = sorted(path.glob("adapters*/**/*.*"))
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in found
        if f.is_file() and f.name not in ("fedgrove.json", "measures.json")
    }


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("data") / "seven", clients=7, rows=12)


def test_with_full_budgets_it_is_fedit_with_uniform_weights(
    tiny_bert: Path, seven: Path, tmp_path: Path
) -> None:
    plain = tiny_job(
        tiny_bert,
        seven,
        federation={"fraction": 0.7},
        train={"final_local_epochs": 1},
        run={"rounds": 2},
    )
    theirs = plain.override(["method=fedit", "method.weights=uniform", "lora.rank=8"])
    run(theirs, tmp_path / "theirs")
    found = files(tmp_path / "theirs")
    assert len(found) == (8 + 7) * 3  # with _global, and the seven tuned ones
    for selection in ("random", "gradient"):
        keys = [
            "method=fed-plora",
            f"method.selection={selection}",
            "federation.ranks=[8]",
            "lora.rank=8",
        ]
        run(plain.override(keys), tmp_path / selection)
        assert files(tmp_path / selection) == found
    run(theirs.override(["method.weights=examples"]), tmp_path / "examples")
    assert files(tmp_path / "examples") != found


@pytest.mark.parametrize("selection", ["random", "least_trained"])
def test_a_resumed_run_is_bit_identical(
    selection: str, tiny_bert: Path, seven: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert,
        seven,
        method={"name": "fed-plora", "selection": selection},
        federation={"ranks": [1, 2, 4, 3], "fraction": 0.3},
        lora={"rank": 4},
        run={"rounds": 4, "noise": True, "checkpoint_every": 2},
    )
    run(job, tmp_path / "whole")
    for stop in (StopAfter(2), StopAfter(4)):
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", resume=True, callbacks=[stop])
    run(job, tmp_path / "cut", resume=True)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    for name in ("noise.jsonl", "cosines.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert {
        line["client"]
        for line in read(tmp_path / "cut" / "metrics.jsonl")
        if line["split"] == "train"
    } < {f"site-{n}" for n in range(7)}


def test_a_run_of_mixed_ranks_sends_what_the_theory_says(
    tiny_bert: Path, seven: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert, seven, **MIXED, method={"name": "fed-plora"}, run={"noise": True, "rounds": 2}
    )
    result = run(job, tmp_path / "out")
    ranks = {name: row["rank"] for name, row in result.summary["clients"].items()}
    assert list(ranks.values()) == [1, 2, 4, 3, 1, 2, 4]
    one = 4 * (32 + 32)  # numbers in one module of all four sites
    for line in read(tmp_path / "out" / "metrics.jsonl"):
        if line["split"] == "train":
            assert line["bytes_up"] == 4 * ranks[line["client"]] * one
            assert line["bytes_down"] == 4 * 4 * one
    for line in map(json.loads, (tmp_path / "out" / "noise.jsonl").read_text().splitlines()):
        assert line["n_init"] == 0.0
        assert line["n_init_adapter"] == 0.0
        assert 0 < line["n_agg"] <= line["bound"]
        assert all(site["n_init"] == 0.0 for site in line["sites"].values())
    models = {
        content
        for name, content in files(tmp_path / "out").items()
        if name.endswith("adapter_model.safetensors")
    }
    assert len(models) == 1  # every client leaves with all R modules, and so does _global


def test_side_and_dense_folding_give_the_same_run(
    tiny_bert: Path, seven: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    found: list[dict[str, Tensor]] = []
    for folding in ("side", "dense"):
        job = tiny_job(
            tiny_bert,
            seven,
            **MIXED,
            method={"name": "fed-plora", "folding": folding},
            run={"rounds": 2},
        )
        run(job, tmp_path / folding)
        found.append(
            load_file(tmp_path / folding / "adapters" / "_global" / "adapter_model.safetensors")
        )
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=2e-4)
    assert any(
        not torch.equal(tensor, found[1][name]) for name, tensor in found[0].items()
    )  # it was another path


def test_an_index_that_nobody_trained_keeps_its_bits(tiny_bert: Path, tmp_path: Path) -> None:
    silos = save_silos(tmp_path / "one", clients=1)
    job = tiny_job(
        tiny_bert,
        silos,
        method={"name": "fed-plora"},
        federation={"ranks": [1]},
        lora={"rank": 4},
        train={"weight_decay": 0.5},
        run={"rounds": 1, "checkpoint_every": 1},
    )
    from safetensors.torch import load_file

    from fedgrove.engines.local import prepare

    run(job, tmp_path / "out")
    start = prepare(job).method.setting.shared_draw()
    tensors = load_file(tmp_path / "out" / "adapters" / "_global" / "adapter_model.safetensors")
    after = [tensors[name] for name in sorted(tensors) if "lora_A" in name]
    before = [start[name].A for name in sorted(start)]
    same = [
        [bool(torch.equal(a[j], b[j])) for j in range(4)]
        for a, b in zip(after, before, strict=True)
    ]
    assert sum(same[0]) == 3
    assert all(each == same[0] for each in same)  # one draw for all sites


def test_different_ranks_with_a_client_scale_leave_nothing_behind(
    tiny_bert: Path, seven: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert,
        seven,
        method={"name": "fed-plora"},
        federation={"ranks": [2, 4]},
        lora={"scaling": "client"},
    )
    with pytest.raises(JobError, match=r"lora\.scaling"):
        run(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_client_never_seen_gets_the_global_model(
    tiny_bert: Path, seven: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert,
        seven,
        method={"name": "fed-plora"},
        federation={"ranks": [1, 2, 4, 3], "held_out": ["site-6"]},
        lora={"rank": 4},
        run={"rounds": 1},
    )
    run(job, tmp_path / "out")
    found = files(tmp_path / "out")
    name = "adapter_model.safetensors"
    assert found[f"adapters/site-6/{name}"] == found[f"adapters/_global/{name}"]
