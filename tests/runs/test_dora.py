"""``lora.dora``: whole jobs, what protects and compresses them, what leaves, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.engines.test_flower_equal import same
from tests.interop.test_peft import TEXTS, in_peft
from tests.methods.kit import PER_RANK
from tests.stops import StopAfter
from tests.test_run import adapters
from tests.tiny import sentences, tiny_job, without_reports

import fedgrove as fg
from fedgrove.adapters.adapter import Dora, Factors
from fedgrove.adapters.algebra import mean
from fedgrove.adapters.lowrank import compact
from fedgrove.aggregate.aggregate import aggregate
from fedgrove.engines.local import prepare
from fedgrove.ground.errors import AdapterError, FedgroveError, JobError
from fedgrove.interop.models import load_base
from fedgrove.interop.peft import read_adapter
from fedgrove.methods.registry import method_class, names
from fedgrove.methods.rule import takes_magnitudes
from fedgrove.start import run
from fedgrove.training.frozen import FrozenLayers
from fedgrove.use.adapt import adapt
from fedgrove.wire.compress import passed, squeeze
from fedgrove.wire.validate import fault

__all__ = ["virtual"]
OUTPUTS = 4 * 32  # magnitudes of the tiny model: query and value of two layers
HEAD = 2 * 32 + 2  # which travels for the newcomer


def dora_job(bert: Path, silos: Path, /, **changes: dict[str, Any]) -> Any:
    """Two rounds of DoRA at rank 4."""
    changes["lora"] = {"rank": 4, "dora": True, **changes.get("lora", {})}
    changes["run"] = {"rounds": 2, **changes.get("run", {})}
    return tiny_job(bert, silos, **changes)


@pytest.fixture(scope="module")
def done(tiny_bert: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """FedIT with DoRA, trained fast enough that magnitudes move."""
    out = tmp_path_factory.mktemp("dora") / "run"
    job = dora_job(
        tiny_bert,
        silos,
        federation={"held_out": ["site-2"]},
        train={"lr": 2e-2, "final_local_epochs": 1},
    )
    with without_reports():
        return run(job, out)


def magnitudes(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: value for name, value in tensors.items() if "magnitude" in name}


def test_peft_and_load_give_the_run_s_logits(done: Any, tiny_bert: Path) -> None:
    norms = FrozenLayers(load_base(str(tiny_bert))).norms()
    for name in done.names():
        folder = done.client(name).path
        assert json.loads((folder / "adapter_config.json").read_text())["use_dora"] is True
        found = magnitudes(folder)
        assert len(found) == 4
        for key, value in found.items():
            site = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            assert (value - norms[site]).abs().max() > 1e-3  # it trained
        model = fg.load(folder)
        ours = model.logits(TEXTS)
        torch.testing.assert_close(in_peft(tiny_bert, folder, stock=False), ours, atol=2e-6, rtol=0)
        measured = done.client(name).evaluate()["accuracy"]
        assert measured == done.summary["clients"][name]["metric"]


def test_its_numbers_are_counted(done: Any) -> None:
    sent = done.summary["parameters"]["sent_up"]
    assert sent == 4 * PER_RANK + OUTPUTS + HEAD


def test_a_merged_model_is_the_same(done: Any, tmp_path: Path) -> None:
    client = done.client(done.names()[0])
    client.export(tmp_path / "merged", merge=True)
    whole = fg.load(tmp_path / "merged").logits(TEXTS)
    torch.testing.assert_close(whole, client.model().logits(TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", [{"rank": 2}, {"to": "vllm"}, {"to": "gguf"}])
def test_what_cannot_hold_it_is_refused(done: Any, tmp_path: Path, how: Any) -> None:
    out = tmp_path / ("out.gguf" if how.get("to") == "gguf" else "out")
    with pytest.raises(FedgroveError, match=r"use_dora = true|is a classifier"):
        done.client(done.names()[0]).export(out, **how)
    assert not out.exists()


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("method", ["fedit", "fedsa-lora"])
def test_flower_gives_the_same(method: str, tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = dora_job(tiny_bert, silos, method={"name": method}, train={"cohort": 1})
    with without_reports():
        run(job, tmp_path / "local")
        run_on(FakeGrid(3), job, tmp_path / "flower")
    same(tmp_path / "local", tmp_path / "flower")


@pytest.mark.parametrize("method", ["fedit", "fedsa-lora"])
def test_a_killed_run_goes_on_to_the_same(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = dora_job(tiny_bert, silos, method={"name": method}, run={"rounds": 3})
    with without_reports():
        run(job, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "killed", callbacks=[StopAfter(2)])
        run(job, tmp_path / "killed", resume=True)
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "killed")


@pytest.mark.parametrize(
    "changes",
    [
        {"run": {"compress": "int8"}},
        {
            "privacy": {"clip": 0.5, "secure_aggregation": True},
            "method": {"weights": "uniform"},
        },
        {"privacy": {"example_clip": 1.0, "example_noise": 1.0}},
        {"defence": {"rule": "median", "norm": 1.0}, "method": {"weights": "uniform"}},
    ],
    ids=["int8", "masked", "example-level", "median"],
)
def test_what_protects_or_compresses_runs(
    changes: Any, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = dora_job(tiny_bert, silos, **changes)
    with without_reports():
        result = run(job, tmp_path / "out")
    found = magnitudes(result.client(result.names()[0]).path)
    assert len(found) == 4
    assert all(torch.isfinite(value).all() for value in found.values())


def test_a_clip_of_nothing_moves_nothing(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """Magnitudes are in what is clipped."""
    job = dora_job(
        tiny_bert,
        silos,
        privacy={"clip": 1e-9},
        method={"weights": "uniform"},
        train={"lr": 0.05},
    )
    with without_reports():
        result = run(job, tmp_path / "out")
    norms = FrozenLayers(load_base(str(tiny_bert))).norms()
    for key, value in magnitudes(result.client(result.names()[0]).path).items():
        site = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        torch.testing.assert_close(value, norms[site], atol=1e-6, rtol=0)


def test_magnitudes_travel_as_they_are() -> None:
    M = torch.tensor([50.0, 50.01, 1e-3])
    dora = Dora(torch.randn(2, 4), torch.randn(3, 2), 1.0, M)
    for how in ("fp16", "int8"):
        found = passed({"site": dora}, how)["site"]
        assert isinstance(found, Dora)
        assert torch.equal(found.M, M)
        assert not torch.equal(found.A, dora.A)
        assert squeeze({"site": dora}, how)["site"]["sides"][2] is M  # type: ignore[index]


def test_the_wire_knows_what_the_job_trains(tiny_bert: Path, silos: Path) -> None:
    jobs = {True: dora_job(tiny_bert, silos), False: tiny_job(tiny_bert, silos)}
    methods = {dora: prepare(job).method for dora, job in jobs.items()}
    drawn = {dora: method.setting.shared_draw() for dora, method in methods.items()}
    for dora, method in methods.items():
        assert fault({"method": {"adapter": drawn[dora]}}, method=method) is None
        assert "magnitudes" in str(fault({"method": {"adapter": drawn[not dora]}}, method=method))
    short = {
        name: replace(each, M=each.M[:-1])
        for name, each in drawn[True].items()
        if isinstance(each, Dora)
    }
    wrong = fault({"method": {"adapter": short}}, method=methods[True])
    assert wrong is not None
    assert "has the shape 31, but that layer has 32 features there" in wrong


def test_directories_are_averaged_tensor_by_tensor(done: Any, tmp_path: Path) -> None:
    """Of tuned adapters, which differ; PEFT's own directories are the same."""
    folders = sorted((done.path / "adapters_tuned").iterdir())[:2]
    written = aggregate("fedit", folders, tmp_path / "out", weights="3,1")
    assert written.n_agg is None
    mean, _, config = read_adapter(tmp_path / "out" / "_global", dora=True)
    assert config["use_dora"] is True
    first, second = (read_adapter(folder, dora=True)[0] for folder in folders)
    assert not torch.equal(*(next(iter(each.values())).tensors["M"] for each in (first, second)))
    for site, factors in mean.items():
        for letter, value in factors.tensors.items():
            wanted = 0.75 * first[site].tensors[letter] + 0.25 * second[site].tensors[letter]
            torch.testing.assert_close(value, wanted, atol=1e-7, rtol=1e-6)
    fg.load(tmp_path / "out" / "_global").logits(TEXTS)
    with pytest.raises(AdapterError, match="has no rule for its magnitudes"):
        aggregate("flexlora", folders, tmp_path / "flexlora")
    assert not (tmp_path / "flexlora").exists()


@pytest.mark.parametrize(("method", "common"), [("fedsa-lora", "A"), ("fedvlm", "BM")])
def test_in_directories_too_magnitudes_go_with_b(
    method: str, common: str, done: Any, tmp_path: Path
) -> None:
    folders = sorted((done.path / "adapters_tuned").iterdir())[:2]
    aggregate(method, folders, tmp_path / "out")
    before = [read_adapter(folder, dora=True)[0] for folder in folders]
    after = [read_adapter(tmp_path / "out" / folder.name, dora=True)[0] for folder in folders]
    for site in before[0]:
        for letter in "ABM":
            sides = [each[site].tensors[letter] for each in before]
            mean_of_both = (sides[0] + sides[1]) / 2
            for own, given in zip(sides, after, strict=True):
                wanted = mean_of_both if letter in common else own
                torch.testing.assert_close(given[site].tensors[letter], wanted)


@pytest.mark.parametrize(
    ("method", "sent", "trained"),
    [("ffa-lora", "BM", "BM"), ("fedsa-lora", "A", "ABM"), ("fedvlm", "BM", "ABM")],
)
def test_magnitudes_go_where_b_goes(
    method: str, sent: str, trained: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """What leaves is PEFT's; what stays is the client's own."""
    job = dora_job(tiny_bert, silos, method={"name": method}, train={"lr": 2e-2})
    with without_reports():
        result = run(job, tmp_path / "out")
    sizes = {"A": 4 * 32 * 4, "B": 4 * 32 * 4, "M": OUTPUTS}
    counts = result.summary["parameters"]
    assert counts["sent_up"] == sum(sizes[letter] for letter in sent)
    assert counts["trained"] == sum(sizes[letter] for letter in trained) + HEAD
    own = []
    for name in result.names():
        folder = result.client(name).path
        ours = fg.load(folder).logits(TEXTS)
        torch.testing.assert_close(in_peft(tiny_bert, folder, stock=False), ours, atol=2e-6, rtol=0)
        measured = result.client(name).evaluate()["accuracy"]
        assert measured == result.summary["clients"][name]["metric"]
        own.append(magnitudes(folder))
    norms = FrozenLayers(load_base(str(tiny_bert))).norms()
    for key, value in own[0].items():
        site = key.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        assert (value - norms[site]).abs().max() > 1e-3
        assert torch.equal(value, own[1][key]) == ("M" in sent)


def test_a_newcomer_tunes_its_magnitudes(done: Any, tmp_path: Path) -> None:
    file = tmp_path / "new.jsonl"
    lines = [json.dumps(row) for row in sentences(30, seed=9)]
    file.write_text("\n".join(lines), encoding="utf-8")
    found = adapt(done.path, file, out=tmp_path / "new")
    first = magnitudes(done.client(done.names()[0]).path)
    own = magnitudes(found.path)
    assert all(not torch.equal(value, first[key]) for key, value in own.items())


TAKES = {"fedit", "ffa-lora", "fedsa-lora", "fedvlm", "local"}
NONE = sorted(set(names()) - TAKES)


@pytest.mark.parametrize("method", NONE)
def test_a_method_without_a_rule_refuses(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    assert not takes_magnitudes(method_class(method))
    job = dora_job(tiny_bert, silos, method={"name": method}, run={"rounds": 6})
    with pytest.raises(JobError, match=r"lora\.dora = true trains a magnitude .* has no rule"):
        run(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": {"dropout": 0.1}}, r"lora\.dropout drops inputs of A alone"),
        ({"model": {"quantize": "4bit"}}, r"model\.quantize holds weights in few bits"),
        ({"model": {"adapter": "x"}}, r"model\.adapter is joined to what trained"),
        ({"run": {"noise": True}}, r"run\.noise = true measures low-rank products"),
        ({"defence": {"rule": "krum"}}, r"compares clients by their products B A"),
    ],
)
def test_what_has_no_meaning_is_refused(
    changes: Any, said: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    changes.setdefault("model", {})["name"] = str(tiny_bert)
    with pytest.raises(JobError, match=said):
        run(dora_job(tiny_bert, silos, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_parts_are_refused(done: Any) -> None:
    adapter, _, _ = read_adapter(done.client(done.names()[0]).path, dora=True)
    plain = {site: Factors(each.A, each.B, each.scale) for site, each in adapter.items()}
    with pytest.raises(AdapterError, match="with magnitudes"):
        mean([plain, adapter])
    with pytest.raises(AdapterError, match="magnitudes, which this cannot take"):
        compact(adapter)
