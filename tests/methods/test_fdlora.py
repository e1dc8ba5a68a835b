"""FDLoRA (2406.07925): two LoRAs that take turns, the reset every H rounds, and two weights fitted
at the end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import (
    PER_RANK,
    Opened,
    adapter,
    aggregated,
    exports,
    info,
    lines,
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
from fedgrove.adapters.assembly import Assembly, Term, as_one_adapter
from fedgrove.engines.local import prepare
from fedgrove.methods.contract import Step, Trained, keep, reveal
from fedgrove.methods.fdlora import FUSION, FDLoRA, Fused, Personal
from fedgrove.methods.records import Whole
from fedgrove.start import run
from fedgrove.training.kernel import Clock, some

JOB: dict[str, Any] = {"method": {"name": "fdlora", "reset_every": 2}, "run": {"rounds": 3}}


def test_the_server_takes_the_mean_and_leaves_the_local_round_alone() -> None:
    ours = method("fdlora", weights="uniform")
    adapters = [adapter(n, size=10.0**n) for n in range(3)]
    state = aggregated(
        ours, {"whole": {}}, 5, [update(f"c{n}", n + 1, adapter=a) for n, a in enumerate(adapters)]
    )
    want = {
        s: Factors(
            torch.stack([a[s].A for a in adapters]).mean(0),
            torch.stack([a[s].B for a in adapters]).mean(0),
            2.0,
        )
        for s in adapters[0]
    }
    near(state.whole, want)
    assert aggregated(ours, state, 6, [update("c0", 1)]) is state


def played(ours: Any, offer: Any, mine: Any, round: int, size: float) -> tuple[Any, Any]:
    """A round in which training adds ``size`` to every B that trains; gives (start of the personal
    LoRA, new store).
    """
    start, trained = None, []
    for step in ours.plan(info("a"), offer, mine, round):
        terms = tuple(
            replace(t, adapter={s: Factors(f.A, f.B + size, f.scale) for s, f in t.adapter.items()})
            if t.train
            else t
            for t in step.assembly.terms
        )
        start = next((t.adapter for t in step.assembly.terms if t.name == "own" and t.train), start)
        trained.append(Trained(replace(step.assembly, terms=terms), 0.0, 1))
    return start, keep(ours.report(info("a"), trained, offer, mine, round)[1])


def test_the_personal_module_restarts_from_the_global_one_every_h_rounds() -> None:
    ours = method("fdlora", rounds=20, reset_every=3)
    mine: Any = Personal()
    for round in (
        1,
        2,
        3,
        4,
        5,
        9,
        10,
    ):  # absent in 6, 7 and 8: the reset of round 7 is made up for in round 9
        offer = Whole(adapter(100 + round))
        before = mine
        start, mine = played(ours, offer, mine, round, 1.0)
        if round in (1, 4, 9, 10):
            assert same(start, offer.whole), round
        else:
            assert same(start, reveal(before.own)), round
            assert not same(start, offer.whole)


def test_with_a_local_start_the_first_global_module_is_the_mean_of_the_personal_ones() -> None:
    ours = method("fdlora", start="local", reset_every=3)
    offer = Whole(adapter(100))
    (step,) = ours.plan(info("a"), offer, Personal(), 1)
    assert step.share == 1.0
    trained = Trained(replace(step.assembly, terms=(Term("global", adapter(7)),)), 0.0, 1)
    up, mine = ours.report(info("a"), [trained], offer, Personal(), 1)
    assert same(up.adapter, adapter(7))
    refuses_to_send(mine)
    later = ours.plan(info("a"), Whole(adapter(101)), mine, 2)  # goes on from its own
    assert same(later[0].assembly.adapter("own"), adapter(7))
    assert same(later[1].assembly.adapter("global"), adapter(101))
    usual = method("fdlora", start="shared").plan(info("a"), offer, Personal(), 1)
    assert [t.name for each in usual for t in each.assembly.terms] == ["own", "global"]


def test_the_fit_uses_a_few_examples_and_moves_nothing_but_the_two_weights() -> None:
    ours = method("fdlora", fusion_share=0.25, fusion_examples=5)
    steps = ours.plan(info("a"), Whole(adapter(1)), Personal(), 6)
    assert [(s.share, s.count, s.head) for s in steps] == [(0.75, 0, True), (0.25, 5, False)]
    assert all(not term.train for term in steps[1].assembly.terms)
    assert {n: (e.train, e.home) for n, e in steps[1].assembly.extras.items()} == dict.fromkeys(
        FUSION, (True, "client")
    )
    assert [
        t.name
        for s in ours.plan(info("a"), Whole(adapter(1)), Personal(), 5)
        for t in s.assembly.terms
    ] == [
        "own",
        "global",
    ]


def test_the_fused_model_is_the_weighted_sum_of_both_updates() -> None:
    ours = method("fdlora")
    one, two = adapter(1), adapter(2)
    weights = {
        FUSION[0]: torch.tensor(0.3, dtype=torch.float64),
        FUSION[1]: torch.tensor(-1.2, dtype=torch.float64),
    }
    assembly = ours.personal(info("a"), Whole(one), keep(Personal(two, 1, weights)))
    assert isinstance(assembly.mix, Fused)
    whole = as_one_adapter(assembly, ours.setting.sites)
    for site, factors in whole.items():
        want = 0.3 * one[site].product() - 1.2 * two[site].product()
        torch.testing.assert_close(factors.product(), want, rtol=1e-12, atol=1e-12)


def test_a_resumed_run_is_bit_identical(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    resumes(tiny_bert, silos, tmp_path, [(1, 1), (3, 1)], **JOB)


def test_what_travels_and_what_stays(
    tiny_bert: Path, silos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = watched(monkeypatch)
    run(tiny_job(tiny_bert, silos, **JOB), tmp_path / "out")
    whole = 4 * 4 * PER_RANK
    assert sent(tmp_path / "out", "site-0") == [(whole, whole), (whole, whole), (0, whole)]
    assert wire.private
    assert not wire.leaks()
    refuses_to_send(wire.kept[-1])
    assert {line["steps"] for line in lines(tmp_path / "out", "train")} == {
        4
    }  # 3 halved twice, rounded up


def test_the_export_is_the_fused_model_and_the_weights_were_fitted(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    opened: Opened = exports(tiny_bert, silos, tmp_path, **JOB)
    fitted = [reveal(store["mine"])["fusion"] for store in opened.stores.values()]
    assert len(fitted) == 3
    assert all(abs(float(each[name]) - 0.5) > 1e-3 for each in fitted for name in FUSION)
    newcomer = opened.method.personal(info("new"), opened.state, Personal())
    assert [term.name for term in newcomer.terms] == ["global"]


def test_a_step_with_a_count_sees_so_many_examples(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    prepared = prepare(tiny_job(tiny_bert, silos, **JOB))
    examples = prepared.engine.data["site-0"]["train"]
    kernel, clock = prepared.engine.half.kernel, Clock(0, (1, "site-0"))

    def after(count: int, rows: Any) -> Any:
        assembly = Assembly((Term("own", prepared.method.setting.shared_draw()),))
        step = prepared.head.step(Step(assembly, count=count), {}, {})
        return kernel.train(step, rows, clock).adapter("own")

    drawn = some(examples, Step(Assembly(), count=3), clock)
    assert len(drawn) == 3
    assert drawn == some(examples, Step(Assembly(), count=3), clock)
    assert drawn != some(examples, Step(Assembly(), count=3), Clock(0, (1, "site-1")))
    assert same(after(3, examples), after(0, drawn))
    assert not same(after(3, examples), after(0, examples))


@pytest.mark.parametrize("options", [{"start": "local"}, {"fusion_share": 0.0}])
def test_with_its_options_it_keeps_what_a_method_promises(options: dict[str, Any]) -> None:
    satisfies(FDLoRA, **options)
