"""The noise lab against dense float64 sums, for rules of every kind, and as a run writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.stops import StopAfter
from tests.tiny import save_silos, tiny_job
from torch import Tensor

from fedgrove.adapters import Adapter, Assembly, Convex, Extra, Factors, Mix, Site, Term
from fedgrove.adapters.algebra import concat, mean, pad, truncate
from fedgrove.engines.local import prepare
from fedgrove.ground.errors import RunError
from fedgrove.ground.lines import append, read, truncate_after
from fedgrove.ground.seeds import generator
from fedgrove.methods.contract import Method, Options, Setting, State, Update, WeightedOptions
from fedgrove.methods.fed_plora import FedPLoRA, Modules, PLoRAOptions
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.protocols import global_assembly
from fedgrove.methods.records import OneAdapter, Whole
from fedgrove.methods.registry import names
from fedgrove.runs.directory import RunDirectory
from fedgrove.runs.loop import Loop
from fedgrove.runs.noise import KEYS, NoiseLab, shared_part
from fedgrove.runs.records import Records
from fedgrove.start import run
from fedgrove.tracking.callback import Callback

SITES = {"q": Site("q", 0, 5, 7), "v": Site("v", 1, 8, 6)}  # in, out
S, RANK = 4 / 3, 4
SETTING = Setting(sites=SITES, rank=RANK, alpha=RANK * S, rounds=3, seed=3)


def draw(seed: int, rank: int = RANK, scale: float = S) -> Adapter:
    noise = generator(seed, "adapter")
    return {
        name: Factors(
            torch.randn(rank, site.in_features, generator=noise, dtype=torch.float64),
            torch.randn(site.out_features, rank, generator=noise, dtype=torch.float64),
            scale,
        )
        for name, site in SITES.items()
    }


def dense(adapter: Adapter, site: str) -> Tensor:
    return adapter[site].product()


def one(adapter: Adapter, **more: Any) -> Assembly:
    return Assembly((Term("own", adapter),), **more)


class Toy(Method):
    """Its state is its global assembly."""

    def global_assembly(self, state: State) -> Assembly | None:
        found: Assembly | None = state["assembly"]
        return found


def measured(
    method: Method,
    before: State,
    after: State,
    seen: Sequence[tuple[Assembly, Assembly]],
    content: Sequence[Any] = (),
) -> dict[str, Any]:
    lab = NoiseLab(method, SITES, Path())
    lab.begin(2, before)
    updates = []
    for number, (start, end) in enumerate(seen):
        lab.seen((2, f"c{number}"), start, end)
        updates.append(Update(f"c{number}", 10 * (number + 1), content[number] if content else {}))
    return lab.measure(after, updates)[0]


def norm(matrices: dict[str, Tensor]) -> tuple[dict[str, float], float]:
    sites = {site: float(torch.linalg.norm(matrix)) for site, matrix in matrices.items()}
    return sites, math.sqrt(sum(value**2 for value in sites.values()))


def assert_is(
    line: dict[str, Any], key: str, sites: dict[str, float], tolerance: float = 1e-10
) -> None:
    for site, value in sites.items():
        assert line["sites"][site][key] == pytest.approx(value, rel=tolerance, abs=tolerance)
    total = math.sqrt(sum(value**2 for value in sites.values()))
    assert line[key] == pytest.approx(total, rel=tolerance, abs=tolerance)


# ------------------------------------------------------------ every rule
def test_fedit_loses_nothing_down_and_the_cross_terms_up() -> None:
    before, ends = draw(0), [draw(n) for n in (1, 2, 3)]
    method = FedIT(WeightedOptions(weights="examples"), SETTING)
    p = [1 / 6, 2 / 6, 3 / 6]
    after = mean(ends, p)
    line = measured(method, Whole(before), Whole(after), [(one(before), one(end)) for end in ends])
    lost = {
        s: dense(after, s) - sum(w * dense(e, s) for w, e in zip(p, ends, strict=True))
        for s in SITES
    }
    assert line["n_init"] == 0.0
    assert line["n_init_adapter"] == 0.0
    assert_is(line, "n_agg", norm(lost)[0])
    bound = {
        s: S
        * sum(
            w * float(((e[s].A - after[s].A).norm(dim=1) * (e[s].B - after[s].B).norm(dim=0)).sum())
            for w, e in zip(p, ends, strict=True)
        )
        for s in SITES
    }
    assert_is(line, "bound", bound)
    assert list(line) == [*KEYS, "sites"]
    assert all(list(site) == list(KEYS) for site in line["sites"].values())


def test_truncation_loses_the_dropped_ranks_and_padding_dilutes() -> None:
    """HETLoRA's shape: the first ranks go down, zero-padded factors are averaged."""
    before, ranks = draw(0), (1, 2, 4)
    starts, ends = [truncate(before, r) for r in ranks], [draw(r, r) for r in ranks]
    after = mean([pad(end, RANK) for end in ends])
    toy = Toy(Options(), SETTING)
    line = measured(
        toy,
        {"assembly": one(before)},
        {"assembly": one(after)},
        [(one(a), one(b)) for a, b in zip(starts, ends, strict=True)],
    )
    init = {
        s: sum(float(torch.linalg.norm(dense(before, s) - dense(m, s))) for m in starts) / 3
        for s in SITES
    }
    assert min(init.values()) > 1
    assert_is(line, "n_init", init)
    assert_is(
        line,
        "n_agg",
        norm({s: dense(after, s) - sum(dense(e, s) for e in ends) / 3 for s in SITES})[0],
    )
    assert line["bound"] is None  # padding is no mean over the holders of an index


def test_flora_has_two_readings() -> None:
    """The stack is merged into the base and everyone starts afresh."""
    merged = draw(0, 6, scale=1.0)
    fresh = {s: Factors(f.A, torch.zeros_like(f.B), S) for s, f in draw(1, 2).items()}
    ends = [draw(n, 2) for n in (2, 3)]
    p = [0.5, 0.5]
    after = concat([merged, *ends], [1.0, *p])
    line = measured(
        Toy(Options(), SETTING),
        {"assembly": Assembly(base_delta=merged)},
        {"assembly": Assembly(base_delta=after)},
        [(one(fresh, base_delta=merged), one(end, base_delta=merged)) for end in ends],
    )
    assert line["n_init"] == 0.0
    assert_is(line, "n_init_adapter", norm({s: dense(merged, s) for s in SITES})[0])
    assert line["n_agg"] == pytest.approx(0.0, abs=1e-12)


CHOSEN = st.lists(st.sets(st.integers(0, RANK - 1), min_size=1).map(sorted), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), chosen=CHOSEN, stretch=st.sampled_from([1.0, 1e-3, 1e4]))
def test_fed_plora_loses_nothing_down_and_the_true_bound_holds(
    seed: int, chosen: list[list[int]], stretch: float
) -> None:
    method, before = FedPLoRA(PLoRAOptions(), SETTING), draw(seed)
    seen = []
    content: list[Modules] = []
    for number, own in enumerate(chosen):
        start = method._training(before, own)
        trained = {
            s: replace(f, A=f.A * stretch) for s, f in draw(seed + 1 + number, len(own)).items()
        }
        seen.append((start, replace(start, terms=(replace(start.terms[0], adapter=trained),))))
        content.append(Modules(trained, own))
    after = method.aggregate(Whole(before), 2, [Update("", 1, c) for c in content])
    line = measured(method, Whole(before), after, seen, content)
    assert line["n_init"] == 0.0
    assert line["n_init_adapter"] == 0.0
    assert all(site["n_init"] == 0.0 for site in line["sites"].values())
    lost, bound = {}, {}
    for s in SITES:
        lost[s], bound[s] = dense(after.whole, s), 0.0
        for j in range(RANK):
            held = [
                (c.modules[s], own.index(j))
                for c, own in zip(content, chosen, strict=True)
                if j in own
            ]
            for f, row in held or [(before[s], j)]:
                lost[s] = lost[s] - S * torch.outer(f.B[:, row], f.A[row]) / max(1, len(held))
            for f, row in held:
                off_a, off_b = (
                    f.A[row] - after.whole[s].A[j],
                    f.B[:, row] - after.whole[s].B[:, j],
                )
                bound[s] += S * float(off_a.norm() * off_b.norm()) / len(held)
    assert_is(line, "n_agg", norm(lost)[0], 1e-9 * stretch)
    assert_is(line, "bound", bound, 1e-9 * stretch)
    for each in (line, *line["sites"].values()):
        assert each["n_agg"] <= each["bound"] + 1e-9 * stretch


def test_zero_is_found_and_not_assumed() -> None:
    """Folding with a client's own scale, the error that the paper warns of, is seen as noise."""
    method, before = FedPLoRA(PLoRAOptions(), SETTING), draw(0)
    start = method._training(before, [0, 2])
    wrong = replace(
        start, base_delta={s: replace(f, scale=2 * S) for s, f in (start.base_delta or {}).items()}
    )
    content = Modules(start.adapter("selected"), [0, 2])
    line = measured(method, Whole(before), Whole(before), [(wrong, wrong)], [content])
    rest = {
        s: S * sum((torch.outer(f.B[:, j], f.A[j]) for j in (1, 3)), torch.zeros(()))
        for s, f in before.items()
    }
    assert_is(line, "n_init", norm(rest)[0])
    assert line["n_agg"] == 0.0  # and nothing moved


def test_the_printed_bound_is_false_and_the_true_one_is_tight() -> None:
    """R = d = k = 1 and clients (3, 3), (-3, -3): the sum of the deviations is 6, the noise 9, the
    true bound 9.
    """
    site = {"q": Site("q", 0, 1, 1)}
    method = FedPLoRA(PLoRAOptions(), Setting(sites=site, rank=1, alpha=1.0, rounds=1, seed=0))
    ends = [{"q": Factors(torch.tensor([[x]]), torch.tensor([[x]]), 1.0)} for x in (3.0, -3.0)]
    content = [Modules(end, [0]) for end in ends]
    updates = [Update(f"c{n}", 1, c) for n, c in enumerate(content)]
    before = method.begin([])
    lab = NoiseLab(method, site, Path())
    lab.begin(1, before)
    for update, end in zip(updates, ends, strict=True):
        lab.seen((1, update.client), one(before.whole), one(end))
    line, _ = lab.measure(method.aggregate(before, 1, updates), updates)
    printed = sum(abs(float(end["q"].A)) + abs(float(end["q"].B)) for end in ends) / 2
    assert printed == 6.0
    assert line["n_agg"] == pytest.approx(9.0, abs=1e-12)
    assert line["bound"] == pytest.approx(9.0, abs=1e-12)


def test_cosines_are_means_over_pairs_of_clients_and_over_sites() -> None:
    ends, before = [draw(n, r) for n, r in ((1, 2), (2, 4), (3, 3))], draw(0)
    toy = Toy(Options(), SETTING)
    lab = NoiseLab(toy, SITES, Path())
    lab.begin(2, {"assembly": None})
    updates: list[Update] = [Update(f"c{n}", 1, {}) for n in range(3)]
    for update, end in zip(updates, ends, strict=True):
        lab.seen((2, update.client), one(before), one(end))
    line, matrix = lab.measure({"assembly": None}, updates)
    same, other = [], []
    cells: dict[tuple[int, int, str], list[float]] = {}
    for site in SITES:
        here: dict[bool, list[float]] = {True: [], False: []}
        for i, left in enumerate(ends):
            for k, right in enumerate(ends):
                for p in range(left[site].rank):
                    for q in range(right[site].rank):
                        if i != k:
                            x = torch.outer(left[site].B[:, p], left[site].A[p]).flatten()
                            y = torch.outer(right[site].B[:, q], right[site].A[q]).flatten()
                            value = float(torch.dot(x, y) / x.norm() / y.norm())
                            here[p == q].append(value)
                            cells.setdefault((p, q, site), []).append(value)
        same.append(sum(here[True]) / len(here[True]))
        other.append(sum(here[False]) / len(here[False]))
        assert line["sites"][site]["cos_same"] == pytest.approx(same[-1])
        assert line["sites"][site]["cos_other"] == pytest.approx(other[-1])
    assert line["cos_same"] == pytest.approx(sum(same) / 2)
    assert line["cos_other"] == pytest.approx(sum(other) / 2)
    assert matrix[3][3] is None  # only one client has so many
    for p, q in ((0, 0), (1, 3), (2, 2)):
        want = sum(sum(cells[p, q, s]) / len(cells[p, q, s]) for s in SITES) / 2
        assert matrix[p][q] == pytest.approx(want, abs=1e-4)
    assert [line[key] for key in KEYS[:4]] == [None] * 4  # there is no global model


# ------------------------------------------------------------ what a client runs
def test_private_terms_and_what_mixes_them_are_left_out() -> None:
    shared, own = draw(0), draw(1)
    terms = (Term("shared", shared), Term("own", own, home="client"))
    half = {f"lambda.{layer}": Extra(torch.zeros(())) for layer in (0, 1)}  # sigmoid 0 is a half
    mixed = Assembly(terms, mix=Convex("shared", "own"), extras=half)
    found = shared_part(mixed, SITES)
    assert found is not None
    for site in SITES:
        torch.testing.assert_close(found[site].product(), shared[site].product())
    both = replace(mixed, terms=(terms[0], replace(terms[1], home="server")))
    found = shared_part(both, SITES)
    assert found is not None
    torch.testing.assert_close(
        found["q"].product(), (shared["q"].product() + own["q"].product()) / 2
    )


def test_a_step_of_private_work_alone_is_no_start_and_no_end() -> None:
    """FDLoRA's shape: the personal adapter trains first, the global one after it, and in a last
    round not at all.
    """
    before, after, own = draw(0), draw(1), Assembly((Term("own", draw(2), home="client"),))
    lab = NoiseLab(FedIT(WeightedOptions(), SETTING), SITES, Path())
    for ends_with, n_agg, bound in (
        (one(after), 0.0, 0.0),
        (None, norm({s: dense(after, s) for s in SITES})[1], None),
    ):
        lab.begin(2, Whole(before))
        lab.seen((2, "c"), own, own)
        if ends_with:
            lab.seen((2, "c"), one(before), ends_with)
        lab.seen(("tune", "c"), one(after), one(draw(3)))  # another phase of the run
        line, _ = lab.measure(
            Whole(after if ends_with else concat([before, after])), [Update("c", 1, OneAdapter())]
        )
        assert line["n_init"] == (0.0 if ends_with else None)
        assert line["n_agg"] == pytest.approx(n_agg)
        assert line["bound"] == bound


class Routed(Mix):
    linear = False


def test_a_mix_that_depends_on_the_input_has_no_noise() -> None:
    end = one(draw(1), mix=Routed())
    assert shared_part(end, SITES) is None
    line = measured(
        Toy(Options(), SETTING),
        {"assembly": one(draw(0))},
        {"assembly": one(draw(0))},
        [(end, end)],
    )
    assert line["n_init"] is None
    assert line["n_agg"] is None


def test_a_layer_that_a_client_leaves_out_counts_as_lost_and_is_averaged_without_it() -> None:
    before, ends = draw(0), [draw(1), draw(2)]
    seen = [
        (one(before), one(ends[0])),
        (one(before, layers=frozenset({0})), one(ends[1], layers=frozenset({0}))),
    ]
    after = {"q": mean([{"q": e["q"]} for e in ends])["q"], "v": ends[0]["v"]}
    line = measured(
        Toy(Options(), SETTING), {"assembly": one(before)}, {"assembly": one(after)}, seen
    )
    assert_is(line, "n_init", {"q": 0.0, "v": float(torch.linalg.norm(dense(before, "v"))) / 2})
    q = dense(after, "q") - (dense(ends[0], "q") + dense(ends[1], "q")) / 2
    assert_is(line, "n_agg", {"q": float(torch.linalg.norm(q)), "v": 0.0})


# ------------------------------------------------------------ the files
def test_lines_of_later_rounds_and_a_torn_line_go(tmp_path: Path) -> None:
    path = tmp_path / "noise.jsonl"
    truncate_after(path, 3)
    assert not path.exists()
    for round in (1, 2, 3):
        append(path, {"round": round, "n_init": 0.1 * round})
    with path.open("a") as file:
        file.write('{"round": 4, "n_i')
    assert [line["round"] for line in read(path)] == [1, 2, 3]
    truncate_after(path, 2)
    assert path.read_text() == '{"round": 1, "n_init": 0.1}\n{"round": 2, "n_init": 0.2}\n'
    path.write_text("[]\n")
    with pytest.raises(RunError, match="line 1"):
        read(path)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("data") / "two", clients=3, rows=12)


@pytest.mark.parametrize("method", names())
def test_every_method_records_a_line_a_round(
    method: str, tiny_bert: Path, two: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert, two, method={"name": method}, run={"noise": True}, train={"local_steps": 1}
    )
    out = tmp_path / "out"
    prepared = prepare(job, out)
    RunDirectory(out).open(prepared, resume=False)
    loop = Loop(prepared, Records.at(out, Callback(), prepared.lab))
    had_global = global_assembly(prepared.method, loop.state) is not None
    loop.rounds()
    lines = read(tmp_path / "out" / "noise.jsonl")
    assert [line["round"] for line in lines] == [1, 2, 3]
    # one that falls into groups has a global model until then
    has_global = had_global or global_assembly(prepared.method, loop.state) is not None
    if method in ("fedit", "ffa-lora", "fed-plora"):
        assert all(line["n_init"] == 0.0 and line["n_agg"] is not None for line in lines)
    for line in lines:
        assert list(line) == ["round", *KEYS, "sites"]
        assert list(line["sites"]) == list(prepared.base.sites)
        for each in (line, *line["sites"].values()):
            rooted = method == "grove" and line["round"] == 1  # one model, until its groups grow
            assert has_global or rooted or [each[key] for key in KEYS[:4]] == [None] * 4
            assert each["bound"] is None or each["n_agg"] <= each["bound"] + 1e-6
    assert len(read(tmp_path / "out" / "cosines.jsonl")) == 3


def test_the_lab_changes_nothing_and_a_resume_repeats_it_bit_for_bit(
    tiny_bert: Path, two: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, two, run={"noise": True, "checkpoint_every": 2})
    run(job, tmp_path / "whole")
    for stop in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", resume=True, callbacks=[StopAfter(stop)])
    run(job, tmp_path / "cut", resume=True)
    run(job.override(["run.noise=false"]), tmp_path / "off")
    whole = (tmp_path / "whole" / "noise.jsonl").read_bytes()
    assert len(whole.splitlines()) == 3
    assert whole == (tmp_path / "cut" / "noise.jsonl").read_bytes()
    assert not (tmp_path / "off" / "noise.jsonl").exists()
    model = Path("adapters") / "_global" / "adapter_model.safetensors"
    assert (tmp_path / "whole" / model).read_bytes() == (tmp_path / "off" / model).read_bytes()
    rounds = [json.loads(line) for line in whole.splitlines()]
    assert all(line["n_init"] == 0.0 and line["n_agg"] > 0 for line in rounds)
