"""FedLEASE (2509.15087): the clusters, the means in each, the top-M router against its formula, and
newcomers.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import (
    PER_RANK,
    SITES,
    adapter,
    aggregated,
    exports,
    files,
    info,
    method,
    near,
    resumes,
    same,
    satisfies,
    sent,
    update,
)
from tests.tiny import save_silos, tiny_job

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.assembly import Junction
from fedgrove.ground.errors import JobError
from fedgrove.methods.fedlease import Bases, FedLEASE, TopExperts
from fedgrove.methods.records import Own
from fedgrove.start import run

JOB: dict[str, Any] = {
    "method": {"name": "fedlease", "warmup_rounds": 1, "experts": 2},
    "run": {"rounds": 2},
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("data") / "four", clients=4)


def leaning(seed: int, towards: Adapter, size: float = 1.0) -> Adapter:
    """An adapter whose B is near a multiple of another's."""
    noise = adapter(seed)
    return {s: Factors(noise[s].A, size * (towards[s].B + 0.1 * noise[s].B), 2.0) for s in SITES}


def mean_of(adapters: list[Adapter], weights: list[int]) -> Adapter:
    total = sum(weights)
    return {
        s: Factors(
            sum(
                (w / total * a[s].A for a, w in zip(adapters, weights, strict=True)),
                torch.zeros(()),
            ),
            sum(
                (w / total * a[s].B for a, w in zip(adapters, weights, strict=True)),
                torch.zeros(()),
            ),
            2.0,
        )
        for s in SITES
    }


def grouped(**options: Any) -> tuple[Any, dict[str, Adapter], Any]:
    """Six clients of three kinds, of unlike sizes, after the warm-up."""
    ours = method("fedlease", rounds=9, warmup_rounds=2, **options)
    kinds = [adapter(50 + n) for n in range(3)]
    adapters = {f"c{n}": leaning(n, kinds[n % 3], size=10.0**n) for n in range(6)}
    clients = [info(name) for name in adapters]
    state = ours.begin(clients)
    assert aggregated(ours, state, 1, [update(name, 10) for name in adapters]) is state
    return (
        ours,
        adapters,
        aggregated(
            ours,
            state,
            2,
            [update(name, 10 * (n + 1), expert=a) for n, (name, a) in enumerate(adapters.items())],
        ),
    )


def test_clusters_come_from_the_cosines_of_b_and_the_silhouette() -> None:
    ours, adapters, state = grouped()
    assert state.labels == {"c0": 0, "c1": 1, "c2": 2, "c3": 0, "c4": 1, "c5": 2}
    assert list(state.scores) == ["2", "3", "4", "5"]
    assert max(state.scores, key=state.scores.get) == "3"
    for number in range(3):
        near(
            state.experts[number],
            mean_of([adapters[f"c{number}"], adapters[f"c{number + 3}"]], [number + 1, number + 4]),
        )
    assert {tuple(G.shape) for G in state.routers[0].values()} == {
        (5, s.in_features) for s in SITES.values()
    }
    assert ours.artefacts(state)["experts.json"]["count"] == 3
    fewer = grouped(max_experts=2)[2]
    assert len(fewer.experts) == 2
    assert len(grouped(experts=4)[2].experts) == 4


def test_expert_and_router_are_averaged_within_the_cluster_over_those_that_came() -> None:
    ours, _, state = grouped()
    routers = {
        n: {s: torch.full((5, SITES[s].in_features), float(n)) for s in SITES} for n in (0, 3, 4)
    }
    came = [
        update(f"c{n}", 10 * (n + 1), expert=adapter(70 + n), router=routers[n]) for n in (0, 3, 4)
    ]
    after = aggregated(ours, state, 3, came)
    near(after.experts[0], mean_of([adapter(70), adapter(73)], [1, 4]))
    near(after.experts[1], adapter(74))
    assert same(after.experts[2], state.experts[2])
    assert torch.allclose(after.routers[0]["layer.0.query"], torch.tensor(3 * 4 / 5))
    assert torch.equal(after.routers[2]["layer.0.query"], state.routers[2]["layer.0.query"])
    assert after.anchors is state.anchors


def test_one_or_two_clients_are_one_cluster() -> None:
    for count in (1, 2):
        ours = method("fedlease", rounds=3)
        state = ours.begin([info(f"c{n}") for n in range(count)])
        state = aggregated(
            ours, state, 1, [update(f"c{n}", 10, expert=adapter(n)) for n in range(count)]
        )
        assert len(state.experts) == 1
        assert state.routers == []
        assembly = ours.personal(info("c0"), ours.offer(state, 2, info("c0")), Own())
        assert [(t.name, t.train) for t in assembly.terms] == [("expert.0", "ABM")]
        assert not assembly.extras


@pytest.mark.parametrize("own", [0, 1, 2])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_router_takes_the_top_m_of_its_outputs(own: int, normalise: bool) -> None:
    site = SITES["layer.2.value"]
    rng = torch.Generator().manual_seed(own)
    x = torch.randn(2, 4, site.in_features, generator=rng, dtype=torch.float64)
    G = torch.randn(5, site.in_features, generator=rng, dtype=torch.float64)
    names = ["expert.0", "expert.1", "expert.2"]
    got = TopExperts(own, 3, normalise).weigh(Junction(site, x, names, {f"router.{site.name}": G}))
    others = [n for n in range(3) if n != own]
    for b, t in itertools.product(range(2), range(4)):
        p = torch.softmax(G @ x[b, t], 0)
        chosen = sorted(range(5), key=lambda n: -float(p[n]))[:3]
        want = [0.0, 0.0, 0.0]
        for output in chosen:
            want[own if output < 3 else others[output - 3]] += float(p[output])
        if normalise:
            want = [w / sum(want) for w in want]
        for n in range(3):
            assert got[n].shape == (2, 4, 1)  # type: ignore[union-attr]
            assert float(got[n][b, t, 0]) == pytest.approx(want[n])  # type: ignore[index]


def test_the_weights_add_up_to_one_by_default_as_the_authors_have_it() -> None:
    ours, _, state = grouped()
    (client,) = [info("c0")]
    mix = ours.personal(client, ours.offer(state, 3, client), Own()).mix
    assert mix.normalise
    assert not grouped(normalise=False)[0].options.normalise
    site = SITES["layer.0.query"]
    x = torch.randn(2, 3, site.in_features)
    even = torch.zeros(5, site.in_features)
    weights = mix.weigh(
        Junction(site, x, [f"expert.{n}" for n in range(3)], {f"router.{site.name}": even})
    )
    torch.testing.assert_close(sum(weights), torch.ones(2, 3, 1))


def test_a_newcomer_runs_the_even_mix_then_joins_the_expert_closest_to_its_probe() -> None:
    ours, adapters, state = grouped()
    new = info("c0-again")
    at_once = ours.welcome(state, new, None)
    even = ours.personal(new, at_once, Own())
    assert even.mix.linear
    assert dict(even.mix.weights) == {f"expert.{n}": 1 / 3 for n in range(3)}
    assert ours.probe(new, at_once) is not None
    for number in range(3):
        probe = Bases({s: f.B for s, f in leaning(99, adapters[f"c{number}"], 7.0).items()})
        placed = ours.welcome(state, new, probe)
        assert placed.label == number
        assert f"expert {number} of 3" in placed.placed
        assert ours.personal(new, placed, Own()).mix == TopExperts(number, 3)


def test_a_warm_up_that_cannot_be_is_refused() -> None:
    with pytest.raises(JobError, match="warmup_rounds = 7 is more than"):
        method("fedlease", warmup_rounds=7)
    with pytest.raises(JobError, match="experts = 1"):
        method("fedlease", warmup_rounds=0)


def test_one_expert_without_a_warm_up_is_fedit(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    ours = {"name": "fedlease", "warmup_rounds": 0, "experts": 1}
    run(tiny_job(tiny_bert, silos, method={"name": "fedit"}, run={"rounds": 2}), tmp_path / "fedit")
    run(tiny_job(tiny_bert, silos, method=ours, run={"rounds": 2}), tmp_path / "ours")
    found = {n: d for n, d in files(tmp_path / "ours").items() if not n.endswith("fedgrove.json")}
    assert len(found) == 9
    fedit = files(tmp_path / "fedit")
    assert found == {name: fedit[name] for name in found}


def test_a_warm_up_alone_is_local_until_the_clusters(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    from tests.methods.kit import lines

    run(tiny_job(tiny_bert, silos, method={"name": "local"}, run={"rounds": 2}), tmp_path / "local")
    run(
        tiny_job(
            tiny_bert, silos, method={"name": "fedlease", "warmup_rounds": 2}, run={"rounds": 2}
        ),
        tmp_path / "ours",
    )
    ours, local = lines(tmp_path / "ours"), lines(tmp_path / "local")
    for one, other in zip(ours, local, strict=True):
        if one["split"] == "train" or one["round"] == 1:
            assert one["loss"] == other["loss"]


def test_a_resumed_run_is_bit_identical(tiny_bert: Path, four: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, four, tmp_path, [(1, 1), (2, 1)], **JOB)


def test_what_travels(tiny_bert: Path, four: Path, tmp_path: Path) -> None:
    found = run(tiny_job(tiny_bert, four, **JOB), tmp_path / "out")
    whole, router = 4 * 4 * PER_RANK, 4 * 4 * 3 * 32
    assert sent(tmp_path / "out", "site-0") == [(whole, 0), (whole + router, 2 * whole + router)]
    assert found.summary["parameters"]["stored"] == 2 * 4 * PER_RANK + 4 * 3 * 32 + 2 * 32 + 2


def test_the_written_model_gives_the_logits_of_the_run(
    tiny_bert: Path, four: Path, tmp_path: Path
) -> None:
    mixes = []
    exports(tiny_bert, four, tmp_path, lambda assembly: mixes.append(assembly.mix), **JOB)
    assert {mix.own for mix in mixes} == {0, 1}


def test_held_out_clients_are_placed(tiny_bert: Path, four: Path, tmp_path: Path) -> None:
    job = {**JOB, "federation": {"held_out": ["site-3"]}, "train": {"final_local_epochs": 1}}
    found = run(tiny_job(tiny_bert, four, **job), tmp_path / "out")
    assert found.summary["clients"]["site-3"]["held_out"]
    assert (
        found.client("site-3").evaluate()["accuracy"]
        == found.summary["clients"]["site-3"]["metric"]
    )


@pytest.mark.parametrize("options", [{"experts": 3}, {"experts": 1, "warmup_rounds": 0}])
def test_with_its_options_it_keeps_what_a_method_promises(options: dict[str, Any]) -> None:
    satisfies(FedLEASE, **options)
