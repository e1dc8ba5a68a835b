"""The parts of ``benchmarks/evidence.py``: what its numbers rest on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import save_llama, without_reports

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.clustering.tree import merge_tree
from fedgrove.methods import registry
from fedgrove.methods.contract import ClientInfo, Setting, Update
from fedgrove.methods.records import OneAdapter, Whole

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from study import claims, effects, fields, oracle, pages, pictures, planted, results, trials  # noqa: E402
from study.fields import FIELDS  # noqa: E402
from study.trials import Record  # noqa: E402


@pytest.fixture(autouse=True)
def known_oracle() -> Iterator[None]:
    """The oracle is a method while a test of this file runs, and no longer."""
    for own in oracle.METHODS:
        registry.register(own)
    yield
    registry.METHODS.forget()


SITES = {"layer.0.query": Site("layer.0.query", 0, 3, 4)}


# ------------------------------------------------------------------ effects


def test_the_interval_is_that_of_the_seeds_mean_differences() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    clients = [f"c{index}" for index in range(6)]
    other = {seed: dict.fromkeys(clients, 1.0) for seed in range(5)}
    shifts = rng.normal(0.3, 0.1, 5)
    ours = {
        seed: {name: 1.0 + shifts[seed] + value for name, value in zip(clients, noise, strict=True)}
        for seed, noise in enumerate(rng.normal(0, 0.05, (5, 6)))
    }
    found = effects.paired(ours, other, higher=True)
    assert found is not None
    means = [np.mean(list(ours[seed].values())) - 1.0 for seed in range(5)]
    assert found.mean == pytest.approx(np.mean(means))
    half = stats.t.ppf(0.975, 4) * stats.sem(means)
    # the library's correction for 30 observations differs from the plain one by sqrt(29 / 29)
    assert (found.low, found.high) == pytest.approx(
        (np.mean(means) - half, np.mean(means) + half), rel=1e-6
    )
    assert (found.seeds, found.clients) == (5, 30)


def test_lower_losses_are_an_improvement_and_only_what_both_have_is_paired() -> None:
    ours = {0: {"a": 1.0, "b": 2.0}, 1: {"a": 1.0}, 2: {"a": 9.0}}
    other = {0: {"a": 2.0, "b": 4.0, "c": 0.0}, 1: {"a": 1.5}}
    found = effects.paired(ours, other, higher=False)
    assert found is not None
    assert found.mean == pytest.approx((1.0 + 2.0 + 0.5) / 3)
    assert found.clients == 3
    assert effects.paired({}, other, higher=False) is None


def test_one_seed_has_no_interval() -> None:
    found = effects.paired({0: {"a": 1.0}}, {0: {"a": 0.5}}, higher=True)
    assert found is not None
    assert not found.known


def test_the_tail_is_the_worse_end() -> None:
    losses = {f"c{index:02d}": float(index) for index in range(11)}
    assert effects.tail(losses, higher=False) == pytest.approx(9.0)
    assert effects.tail(losses, higher=True) == pytest.approx(1.0)


def test_recovery_is_one_for_the_truth_and_nought_for_one_group() -> None:
    truth = {"a": 0, "b": 0, "c": 1, "d": 1}
    assert effects.recovery([["c", "d"], ["a", "b"]], truth) == 1.0
    assert effects.recovery([["a", "b", "c", "d"]], truth) == 0.0


def test_groups_are_read_off_each_system_s_own_file() -> None:
    def found(artefacts: dict[str, Any]) -> Any:
        given = dict.fromkeys(Record.__dataclass_fields__, None) | {"artefacts": artefacts}
        return results.layers_of(Record(**given))

    clusters = {"clients": ["a", "b", "c"], "labels": [1, 0, 1], "layers": [0, 1], "late": {"d": 0}}
    assert found({"clusters.json": clusters}) == [[["a", "c"], ["b", "d"]]] * 2
    tree = {"clients": ["a", "b"], "layers": [{"groups": [["a"], ["b"]]}]}
    assert found({"grove.json": tree}) == [[["a"], ["b"]]]
    assert found({}) is None


# ------------------------------------------------------------------ the oracle


def sent(offer: Whole, value: float) -> OneAdapter:
    """What a client sends that trained every B to one value."""
    return OneAdapter(
        {
            site: Factors(factors.A, torch.full_like(factors.B, value), factors.scale)
            for site, factors in offer.whole.items()
        }
    )


def test_each_true_group_is_a_federation_of_its_own() -> None:
    chosen = oracle.Oracle(
        oracle.Oracle.Options(), Setting(sites=SITES, rank=2, alpha=4.0, rounds=3, seed=1)
    )
    names = ["films-0", "films-1", "news-of-day-0"]
    clients = [ClientInfo(name, 2, 10) for name in names]
    state = chosen.begin(clients)
    values = dict(zip(names, (1.0, 3.0, 7.0), strict=True))
    updates = [Update(c.name, 10, sent(chosen.offer(state, 1, c), values[c.name])) for c in clients]
    state = chosen.aggregate(state, 1, updates)
    for client, wanted in zip(clients, (2.0, 2.0, 7.0), strict=True):
        B = chosen.offer(state, 2, client).whole["layer.0.query"].B
        assert torch.equal(B, torch.full_like(B, wanted))
    assert [oracle.group_of(name) for name in names] == ["films", "films", "news-of-day"]


def test_grove_gets_the_true_groups_or_the_same_in_all_layers() -> None:
    names = [f"group{group}-{member}" for group in range(4) for member in range(2)]
    values = Setting(sites=SITES, rank=2, alpha=4.0, rounds=3, seed=1)
    rng = np.random.default_rng(0)
    points = np.repeat(rng.normal(size=(2, 3)), 4, axis=0) + 0.01 * rng.normal(size=(8, 3))
    near = np.linalg.norm(points[:, None] - points[None], axis=2)
    apart = np.ones((8, 8)) - np.eye(8)
    merges = merge_tree(near)
    true = oracle.Regrouped(oracle.OtherGroups(counts=(1, 2, 4)), values)
    cuts = true._cuts(names, [near] * 3, [near] * 3, merges)
    assert [each.labels.tolist() for each in cuts] == [
        [0] * 8,
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 2, 2, 3, 3],
    ]
    same = oracle.Regrouped(oracle.OtherGroups(level=0.2), values)
    cuts = same._cuts(names, [apart, near], [apart, near], merges)
    assert [each.labels.tolist() for each in cuts] == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
    assert [each.layer for each in cuts] == [0, 1]


# ------------------------------------------------------------------ the fields and the cache


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_job_that_loads_with_each_of_its_methods(
    name: str, tmp_path: Path
) -> None:
    field = FIELDS[name]
    for method in field.methods:
        job = trials.trial(field, method, 3, field.quick).job(tmp_path)
        assert job.run.seed == 3
        assert job.train.threads == 1


def test_every_claim_names_methods_that_its_field_runs() -> None:
    for claim in claims.CLAIMS:
        methods = FIELDS[claim.field].methods
        assert {claim.better, claim.worse} <= {*methods}, claim


def test_a_run_is_known_by_what_it_depends_on_and_by_nothing_else() -> None:
    field = FIELDS["generation"]
    one = trials.trial(field, "fedtreelora[fixed_k=4]", 0)
    assert one.file == trials.trial(field, "fedtreelora[fixed_k=4]", 0).file
    others = [
        trials.trial(field, "fedtreelora[fixed_k=4]", 1),
        trials.trial(field, "fedtreelora[fixed_k=3]", 0),
        trials.trial(field, "fedtreelora[fixed_k=4]", 0, ["train.lr=0.1"]),
        trials.trial(replace(field, changes=("run.rounds=2",)), "fedtreelora[fixed_k=4]", 0),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 5


def test_where_and_how_fast_a_run_goes_does_not_count(tmp_path: Path) -> None:
    field = FIELDS["generation"]
    text = field.file.read_text(encoding="utf-8")
    moved = tmp_path / "moved.toml"
    moved.write_text(text.replace('out = "runs/', 'out = "elsewhere/'), encoding="utf-8")
    longer = tmp_path / "longer.toml"
    longer.write_text(text.replace("rounds = 9", "rounds = 10"), encoding="utf-8")
    digest = trials.trial(field, "fedit", 0).digest
    assert trials.trial(replace(field, file=moved), "fedit", 0).digest == digest
    assert trials.trial(replace(field, file=longer), "fedit", 0).digest != digest


# ------------------------------------------------------------------ planted fields


def test_the_planted_tree_is_nested_and_as_wide_as_it_says() -> None:
    made = planted.Planted(counts=(1, 2, 4), members=2)
    names = list(made.clients())
    labels = [made.labels(layer, names) for layer in range(3)]
    assert [len(set(each)) for each in labels] == [1, 2, 4]
    for above, below in pairwise(labels):
        parents: dict[int, set[int]] = {}
        for parent, child in zip(above, below, strict=True):
            parents.setdefault(child, set()).add(parent)
        assert all(len(each) == 1 for each in parents.values())


def test_planted_rows_are_the_same_again_and_each_teacher_is_best_on_its_own(
    tmp_path: Path,
) -> None:
    import json

    made = planted.Planted(counts=(1, 2), members=1, rows=6, hidden=16)
    for folder in ("one", "again"):
        planted.make(made, tmp_path / folder, 5)
    files = sorted((tmp_path / "one" / "silos").iterdir())
    assert [path.stem for path in files] == ["group0-0", "group1-0"]
    for path in files:
        assert path.read_bytes() == (tmp_path / "again" / "silos" / path.name).read_bytes()
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(rows) == 6
    assert all(len(row["completion"].split()) == made.answer for row in rows)


# ------------------------------------------------------------------ a whole small study


@pytest.fixture
def small(tmp_path: Path) -> fields.Field:
    """A field on a tiny model: two groups of two clients that answer differently."""
    import json

    model = save_llama(tmp_path / "model")
    silos = tmp_path / "silos"
    silos.mkdir()
    for group, answer in (("yes", "it was good"), ("no", "it was bad")):
        for member in range(2):
            lines = [{"prompt": f"what is {word}", "completion": answer} for word in ("the", "a")]
            text = "".join(json.dumps(line) + "\n" for line in lines * 4)
            (silos / f"{group}-{member}.jsonl").write_text(text)
    job = tmp_path / "small.toml"
    job.write_text(
        f'[model]\nname = "{model}"\n[lora]\nrank = 2\n'
        f'[data]\nsource = "silos"\npath = "{silos}"\ntask = "generate"\nmax_length = 32\n'
        "max_new_tokens = 4\ngenerate_examples = 1\ntest_fraction = 0.5\n"
        '[train]\nlocal_steps = 2\nbatch_size = 2\ndtype = "float32"\n[run]\nrounds = 2\n'
    )
    return fields.Field(
        name="small",
        title="small",
        differs="answer",
        file=job,
        metric="loss",
        higher=False,
        methods=("base", "local", "fedit", "oracle", "pooled", "fedtreelora[warmup_rounds=1]"),
        full="",
        quick=("run.rounds=2",),
        rates=(1e-3, 2e-3),
    )


def test_a_study_is_cached_read_and_shown(
    small: fields.Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FIELDS, "small", small)
    claim = claims.Claim("ahead", "ours", "small", "oracle", "fedit", "groups")
    monkeypatch.setattr(results, "CLAIMS", [claim])
    study = results.Study(tmp_path / "cache", (0, 1))
    wanted = [trials.trial(small, method, 0) for method in small.methods]
    wanted += [trials.trial(small, method, 1) for method in ("oracle", "fedit")]
    with without_reports():
        for each in wanted:
            record = trials.made(each, study.cache, tmp_path / "scratch")
            assert trials.known(each, study.cache) == record
    ran: list[Any] = []
    monkeypatch.setattr(trials.fg, "run", lambda *_, **__: ran.append(1))
    again = trials.made(trials.trial(small, "oracle", 1), study.cache, tmp_path / "scratch")
    assert ran == []
    assert set(again.rounds) == {"1", "2"}
    assert set(again.bytes) == {"1", "2"}

    found = results.FieldResult(study, small)
    assert set(found.runs) == set(small.methods)
    base, local = found.scores("base"), found.scores("local")
    assert effects.mean(base) > effects.mean(local)
    rows = results.judged(study, ["small"])
    assert rows[0]["effect"]["seeds"] == 2
    table = pages.field_table(found)
    assert all(f"| {method}" in table for method in small.methods)
    drawn = {path.stem for path in pictures.draw(found, tmp_path)}
    assert {"small-bytes", "small-steps", "small-ceilings", "small-tail", "small-tree"} <= drawn


def test_a_claim_is_shown_only_where_its_field_carries_claims() -> None:
    def effect(low: float, high: float) -> effects.Effect:
        return effects.Effect((low + high) / 2, low, high, 5, 80, 0.01)

    assert results.verdict(effect(0.1, 0.3), True)[0] == "shown"
    assert results.verdict(effect(0.1, 0.3), False)[0] == "not shown here"
    assert results.verdict(effect(-0.1, 0.3), True)[0] == "not shown here"
    assert results.verdict(effect(-0.3, -0.1), True)[0] == "contradicted"
    assert results.verdict(effect(-0.3, -0.1), False)[0] == "not shown here"
    assert results.verdict(None, True)[0] == "not run yet"
