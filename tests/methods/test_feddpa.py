"""FedDPA (2403.19211): which steps a round has, the instance-wise mix against its formula, and our
own format.
"""

from __future__ import annotations

from dataclasses import replace
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
    equal_runs,
    exports,
    info,
    method,
    near,
    refuses_to_send,
    resumes,
    same,
    satisfies,
    sent,
    update,
    watched,
)
from tests.tiny import tiny_job

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.assembly import Assembly, Extra, Junction, Term, Weighted
from fedgrove.methods.contract import Trained, reveal
from fedgrove.methods.feddpa import ByExample, ByLocalExample, Down, FedDPAT, Kept
from fedgrove.start import run

F: dict[str, Any] = {"method": {"name": "feddpa-f"}, "run": {"rounds": 3}}
T: dict[str, Any] = {"method": {"name": "feddpa-t"}, "run": {"rounds": 2}}


@pytest.mark.parametrize("name", ["feddpa-f", "feddpa-t"])
def test_the_server_takes_the_mean_of_each_factor_of_the_global_adapter(name: str) -> None:
    ours = method(name)
    adapters = [adapter(n, size=10.0**n) for n in range(3)]
    begun = ours.begin([info("a")])
    state = aggregated(
        ours, begun, 1, [update(f"c{n}", 10 * (n + 1), adapter=a) for n, a in enumerate(adapters)]
    )
    shares = torch.tensor([1 / 6, 2 / 6, 3 / 6], dtype=torch.float64)
    want = {
        s: Factors(
            torch.einsum("n,nij->ij", shares, torch.stack([a[s].A for a in adapters])),
            torch.einsum("n,nij->ij", shares, torch.stack([a[s].B for a in adapters])),
            2.0,
        )
        for s in SITES
    }
    near(state.whole, want)
    assert type(state) is type(begun)


def test_the_global_adapter_weighs_cap_times_the_mean_cosine() -> None:
    """The official direction: what is like the client's own data leaves the local adapter at least
    1 − cap.
    """
    references = torch.tensor([[1.0, 0, 0], [0, 2, 0]], dtype=torch.float64)
    features = torch.tensor([[3.0, 0, 0], [1, 1, 0], [0, 0, 5], [-1, -1, 0]], dtype=torch.float64)
    site = next(iter(SITES.values()))
    x = torch.zeros(4, 6, site.in_features, dtype=torch.float64)
    mix = ByExample(0.5)
    shared, own = mix.weigh(
        Junction(site, x, ["global", "own"], {"references": references}, features)
    )
    root = 2**-0.5
    want = torch.tensor([0.5 * 0.5, 0.5 * root, 0.0, 0.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(shared, want)
    torch.testing.assert_close(own, 1 - want)
    swapped = mix.weigh(Junction(site, x, ["own", "global"], {"references": references}, features))
    assert torch.equal(swapped[0], own)  # type: ignore[arg-type]


def test_a_round_of_t_trains_the_local_adapter_then_the_global_one_alone() -> None:
    ours = method("feddpa-t", local_share=0.25, references=3)
    offer = Down(adapter(1))
    first = list(ours.plan(info("a"), offer, Kept(), 1))
    assert [step.measure for step in first] == ["features", "train", "train"]
    assert first[0].count == 3
    local, alone = first[1:]
    assert local.assembly.mix == Weighted({"global": 0.5, "own": 0.5})
    assert {t.name: (t.train, t.home) for t in local.assembly.terms} == {
        "global": ("", "server"),
        "own": ("ABM", "client"),
    }
    assert offer.whole is not None
    assert same(local.assembly.adapter("own"), offer.whole)
    assert [(t.name, t.train) for t in alone.assembly.terms] == [("global", "ABM")]
    assert (local.share, alone.share) == (0.25, 0.75)
    later = list(ours.plan(info("a"), offer, Kept(adapter(2), torch.ones(3, 2)), 2))
    assert len(later) == 2
    assert same(later[0].assembly.adapter("own"), adapter(2))


@pytest.mark.parametrize(
    ("rounds", "share", "federated"), [(8, 0.25, 6), (3, 0.1, 2), (1, 0.5, 1), (4, 0.0, 4)]
)
def test_the_last_rounds_of_f_are_local(rounds: int, share: float, federated: int) -> None:
    ours = method("feddpa-f", rounds=rounds, local_rounds=share)
    assert ours.federated_rounds == federated
    offer = Down(adapter(1))
    for round in range(1, rounds + 1):
        names = [
            [t.name for t in s.assembly.terms] for s in ours.plan(info("a"), offer, Kept(), round)
        ]
        assert names == ([["global"]] if round <= federated else [[], ["global", "own"]])


def test_f_without_local_rounds_is_fedit(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    ours = {"name": "feddpa-f", "local_rounds": 0.0}
    equal_runs(tiny_bert, silos, tmp_path, ours, {"name": "fedit"}, run={"rounds": 2})


@pytest.mark.parametrize("job", [F, T], ids=["f", "t"])
def test_a_resumed_run_is_bit_identical(
    job: Any, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    resumes(tiny_bert, silos, tmp_path, [(2, 1)], **job)


@pytest.mark.parametrize("job", [F, T], ids=["f", "t"])
def test_what_travels_and_what_stays(
    job: Any, tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = watched(monkeypatch)
    run(tiny_job(tiny_bert, silos, **job), tmp_path / "out")
    whole = 4 * 4 * PER_RANK
    want = [(whole, whole)] * 2 + ([(0, whole)] if job is F else [])
    assert sent(tmp_path / "out", "site-0") == want
    assert not wire.leaks()
    last = wire.kept[-1]
    assert reveal(last).references.shape == (5, 32)
    assert last.own is not None
    for private in (last.own, last.references):
        refuses_to_send(private)


@pytest.mark.parametrize("job", [F, T], ids=["f", "t"])
def test_the_written_model_weighs_each_example_as_the_formula_says(
    job: Any, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    opened: Opened = exports(tiny_bert, silos, tmp_path, **job)
    assembly = opened.assembly("site-1")
    kernel = opened.prepared.engine.half.kernel
    features, references = (
        kernel.features(opened.examples),
        reveal(opened.stores["site-1"]["mine"])["references"],
    )
    got = opened.logits(assembly)
    for n, example in enumerate(opened.examples):
        cosines = [torch.dot(features[n], r) / features[n].norm() / r.norm() for r in references]
        weight = 0.5 * max(0.0, float(sum(cosines)) / len(cosines))
        head = {
            name: Extra(e.value) for name, e in assembly.extras.items() if name.startswith("head.")
        }
        fixed = Assembly(
            tuple(Term(t.name, t.adapter) for t in assembly.terms),
            Weighted({"global": weight, "own": 1 - weight}),
            head,
        )
        torch.testing.assert_close(kernel.logits(fixed, [example])[0], got[n], rtol=0, atol=1e-5)
    assert "references" in assembly.extras


def test_a_client_without_a_local_adapter_deploys_the_global_one() -> None:
    for name in ("feddpa-f", "feddpa-t"):
        ours = method(name)
        state = ours.begin([info("a")])
        assembly = ours.personal(info("new"), ours.welcome(state, info("new"), None), Kept())
        assert [(t.name, t.train) for t in assembly.terms] == [("global", "ABM")]
        assert assembly.mix.linear


def test_with_renew_round_1_is_global_alone_and_a_local_adapter_starts_afresh() -> None:
    """As the official code's loop: no local training in its first round, a new adapter in the
    second, and the client's own from then on.
    """
    ours = method("feddpa-t", renew=True, local_share=0.25)
    offer, mine = Down(adapter(1)), Kept(adapter(2), torch.ones(3, 2))
    (step,) = ours.plan(info("a"), offer, Kept(), 1)
    assert [(t.name, t.train) for t in step.assembly.terms] == [("global", "ABM")]
    assert step.share == 1.0
    trained = Trained(replace(step.assembly, terms=(Term("global", adapter(3)),)), 0.0, 1)
    up, kept = ours.report(info("a"), [trained], offer, Kept(), 1)
    assert same(up.adapter, adapter(3))
    assert kept.own is None
    assert kept.references is None
    for round in (2, 5):  # a client that comes late starts afresh too
        start = list(ours.plan(info("a"), offer, kept, round))[1].assembly.adapter("own")
        assert all(f.A.any() and not f.B.any() for f in start.values())
    for round in (2, 3):
        start = next(ours.plan(info("a"), offer, mine, round)).assembly.adapter("own")
        assert same(start, adapter(2))


def test_features_of_the_base_with_the_local_adapter(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """References and examples are both read with the local adapter as it is deployed."""
    job: dict[str, Any] = {
        "method": {"name": "feddpa-t", "features": "local"},
        "run": {"rounds": 2},
    }
    opened: Opened = exports(tiny_bert, silos, tmp_path, **job)
    assembly = opened.assembly("site-1")
    assert isinstance(assembly.mix, ByLocalExample)
    kernel = opened.prepared.engine.half.kernel
    alone = Assembly((Term("own", assembly.adapter("own")),))
    features = kernel.features(opened.examples, alone)
    bare = kernel.features(opened.examples)
    assert not torch.allclose(features, bare, atol=1e-3)
    references = reveal(opened.stores["site-1"]["mine"])["references"]
    training = opened.prepared.engine.data["site-1"]["train"]
    every = kernel.features(training, alone)
    for row in references:  # each is a training example's
        assert float((every - row).norm(dim=1).min()) < 1e-4
    got = opened.logits(assembly)
    head = {name: e for name, e in assembly.extras.items() if name.startswith("head.")}
    for n, example in enumerate(opened.examples):
        cosines = torch.nn.functional.cosine_similarity(features[n][None], references, dim=1)
        weight = 0.5 * max(0.0, float(cosines.mean()))
        mix = Weighted({"global": weight, "own": 1 - weight})
        fixed = Assembly(tuple(Term(t.name, t.adapter) for t in assembly.terms), mix, head)
        torch.testing.assert_close(kernel.logits(fixed, [example])[0], got[n], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"features": "local"}, {"renew": True}])
def test_with_its_options_it_keeps_what_a_method_promises(options: dict[str, Any]) -> None:
    satisfies(FedDPAT, **options)
