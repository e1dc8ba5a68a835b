"""``model.adapter``: a run that starts from an adapter, and what leaves it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.interop.test_peft import TEXTS, in_peft
from tests.tiny import save_bert, tiny_job, without_reports
from tests.use.test_foreign import trained
from transformers.pytorch_utils import Conv1D

import fedgrove as fg
from fedgrove.adapters import Factors
from fedgrove.engines.flower.deployable import deployable
from fedgrove.ground.errors import FedgroveError, JobError
from fedgrove.interop.peft import read_adapter
from fedgrove.runs.origin import _as_linear, _fold, appended
from fedgrove.start import run
from fedgrove.use.adapt import adapt


def job_from(start: Path, bert: Path, silos: Path, **changes: Any) -> fg.Job:
    values: dict[str, Any] = {"run": {"rounds": 1}, "lora": {"rank": 2}}
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    values["model"] = {"name": str(bert), "adapter": str(start), **changes.get("model", {})}
    return tiny_job(bert, silos, **values)


@pytest.fixture(scope="module")
def first(tiny_bert: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a shared head, whose common model others start from."""
    out = tmp_path_factory.mktemp("origin") / "first"
    job = tiny_job(
        tiny_bert, silos, federation={"head": "shared"}, run={"rounds": 2}, train={"lr": 0.03}
    )
    with without_reports():
        run(job, out)
    return out / "adapters" / "_global"


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """The update of every site in float64, [out, in]."""
    adapter, _, _ = read_adapter(folder)
    return {site: f.map(lambda tensor: tensor.double()).product() for site, f in adapter.items()}


def test_before_training_the_model_is_the_start(
    first: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """With a rate of almost nothing what leaves is the start itself, head and all."""
    job = job_from(first, tiny_bert, silos, train={"lr": 1e-30}, federation={"head": "frozen"})
    with without_reports():
        result = run(job, tmp_path / "out")
    begun = fg.load(first)
    for name in result.names():
        model = result.client(name).model()
        assert model.card["model"] == str(tiny_bert)
        torch.testing.assert_close(model.logits(TEXTS), begun.logits(TEXTS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["fedit", "hilora", "flora", "fedalt"])
def test_what_leaves_is_one_adapter_on_the_original_base(
    method: str, first: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = job_from(
        first,
        tiny_bert,
        silos,
        method={"name": method},
        run={"rounds": 3 if method == "hilora" else 1},
        train={"final_local_epochs": 1},
    )
    with without_reports():
        result = run(job, tmp_path / "out")
    for name in result.names()[:2]:
        one = result.client(name)
        assert one.evaluate()["accuracy"] == pytest.approx(one.summary["metric"])
        assert one.evaluate()["loss"] == pytest.approx(one.summary["loss"], abs=1e-6)
        if method == "fedalt":  # of our own format
            continue
        theirs = in_peft(tiny_bert, one.path, stock=False)
        torch.testing.assert_close(theirs, one.model().logits(TEXTS), atol=2e-6, rtol=0)
        config = json.loads((one.path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_bert)
        if method == "fedit":
            assert config["r"] == 4 + 2
    if method == "hilora":
        one = result.client(result.names()[0])
        tiers = [one.export(tmp_path / tier, tier=tier) for tier in ("root", "cluster", "leaf")]
        whole, start = dense(one.path), dense(first)
        parts = [dense(tier) for tier in tiers]
        for site, update in whole.items():
            added = start[site] + sum(part[site] for part in parts)
            torch.testing.assert_close(update, added, atol=1e-6, rtol=1e-5)


def test_training_on_the_start_is_training_on_the_merged_model(
    first: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """The trained part equals that of a run whose base has the start merged into it."""
    fg.Result(first.parents[1]).client("_global").export(tmp_path / "merged", merge=True)
    headless = tmp_path / "headless"
    shutil.copytree(first, headless)
    (headless / "head.safetensors").unlink()
    merged = tiny_job(tmp_path / "merged", silos, run={"rounds": 1}, lora={"rank": 2})
    with without_reports():
        ours = run(job_from(headless, tiny_bert, silos), tmp_path / "ours")
        theirs = run(merged, tmp_path / "theirs")
    start = dense(first)
    for name in ours.names():
        mine, other = dense(ours.client(name).path), dense(theirs.client(name).path)
        for site in other:
            error = (mine[site] - start[site] - other[site]).norm() / other[site].norm()
            assert error < 1e-3, site


def test_a_start_of_other_sites_and_of_a_whole_classifier(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """PEFT's own: sites under the classifier's prefix, one of them not trained here."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(tiny_bert))
    start = tmp_path / "start"
    trained(model, start, "FEATURE_EXTRACTION", ["query", "key"], use_rslora=True)
    begun, _, _ = read_adapter(start)
    assert any("key" in site for site in begun)
    job = job_from(start, tiny_bert, silos)
    with without_reports():
        result = run(job, tmp_path / "out")
    one = result.client(result.names()[0])
    adapter, _, _ = read_adapter(one.path)
    ranks = {site.rsplit(".", 1)[1]: factors.rank for site, factors in adapter.items()}
    assert ranks == {"query": 4, "key": 2, "value": 2}
    assert one.evaluate()["loss"] == pytest.approx(one.summary["loss"], abs=1e-6)
    stock = job_from(start, tiny_bert, silos, model={"head": "stock"})
    with without_reports():
        other = run(stock, tmp_path / "stock")
    one = other.client(other.names()[0])
    assert one.evaluate()["loss"] == pytest.approx(one.summary["loss"], abs=1e-6)
    theirs = in_peft(tiny_bert, one.path, stock=True)
    torch.testing.assert_close(theirs, one.model().logits(TEXTS), atol=2e-6, rtol=0)


def test_a_start_is_folded_into_a_layer_that_is_held_transposed() -> None:
    rng = torch.Generator().manual_seed(0)
    layer = Conv1D(5, 3)  # weight [in 3, out 5]
    factors = Factors(torch.randn(2, 3, generator=rng), torch.randn(5, 2, generator=rng), 0.5)
    x = torch.randn(4, 3, generator=rng)
    with torch.no_grad():
        before = layer(x)
        _fold(_as_linear(layer), factors)
        torch.testing.assert_close(layer(x), before + 0.5 * x @ factors.A.T @ factors.B.T)


def test_zeros_keep_slices_in_their_place() -> None:
    draw = torch.Generator().manual_seed(0)

    def factors(rank: int, scale: float) -> Factors:
        A = torch.randn(rank, 4, generator=draw, dtype=torch.float64)
        B = torch.randn(3, rank, generator=draw, dtype=torch.float64)
        return Factors(A, B, scale)

    whole, start = {"a": factors(3, 2.0)}, {"a": factors(2, 0.5), "b": factors(1, 4.0)}
    both = appended(whole, start, before=3)
    assert {site: f.rank for site, f in both.items()} == {"a": 5, "b": 4}
    assert not both["b"].B[:, :3].any()
    added = whole["a"].product() + start["a"].product()
    torch.testing.assert_close(both["a"].product(), added)
    torch.testing.assert_close(both["b"].product(), start["b"].product())
    assert appended(whole, {}) is whole


def test_a_run_goes_on_and_newcomers_join_from_the_same_start(
    first: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(first, start)
    job = job_from(start, tiny_bert, silos)
    with without_reports():
        result = run(job, tmp_path / "out")
    assert len(str(result.job.model.adapter_digest)) == 64
    adapted = adapt(result.path, silos / "site-0.jsonl", name="new", epochs=1)
    after = next(key for key in adapted.measures if key != "zero-shot")
    rows = [json.loads(line) for line in (silos / "site-0.jsonl").read_text().splitlines()]
    assert fg.load(adapted.path).evaluate(rows)["examples"] > 0
    assert adapted.measures[after]["loss"] >= 0
    weights = load_file(start / "adapter_model.safetensors")
    save_file(
        {name: value * 2 for name, value in weights.items()}, start / "adapter_model.safetensors"
    )
    with pytest.raises(FedgroveError, match="its files changed since the run was begun"):
        run(job.replace(run={"rounds": 2}), tmp_path / "out", resume=True)
    with pytest.raises(FedgroveError, match="its files changed"):
        adapt(result.path, silos / "site-0.jsonl", name="late", epochs=0)


def spoilt(folder: Path, first: Path, **changes: Any) -> Path:
    """A copy of an adapter with other values in its configuration."""
    shutil.copytree(first, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_what_is_no_start_is_refused_in_one_sentence(
    first: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    wide = save_bert(tmp_path / "wide" / tiny_bert.name, hidden=64)
    dora = spoilt(tmp_path / "dora", first, use_dora=True)
    other = spoilt(tmp_path / "other", first, base_model_name_or_path="roberta-base")
    labels = spoilt(tmp_path / "labels", first)
    card = json.loads((labels / "fedgrove.json").read_text())
    (labels / "fedgrove.json").write_text(json.dumps({**card, "labels": ["no", "yes"]}))
    for start, changes, words in (
        (tmp_path / "nowhere", {}, "there is no such directory"),
        (first.parents[1], {}, "it is a run; name one of its adapters"),
        (tiny_bert, {}, "is no adapter; a whole model is a model.name"),
        (dora, {}, "it is a DoRA adapter"),
        (other, {}, "it is an adapter of roberta-base, and model.name is"),
        (labels, {}, r"its head is for the labels \['no', 'yes'\], and the job has"),
        (first, {"model": {"head": "stock"}}, 'its head is "pooled", and this job\'s is "stock"'),
        (first, {"model": {"name": str(wide)}}, "it is an adapter of another base"),
    ):
        job = job_from(start, tiny_bert, silos, **changes)
        with pytest.raises(JobError, match=words) as caught:
            run(job, tmp_path / "out")
        assert str(caught.value).startswith("model.adapter = ")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_job_that_would_round_the_start_away_is_refused(
    first: Path, tiny_bert: Path, silos: Path
) -> None:
    with pytest.raises(JobError, match="would round away most of"):
        job_from(first, tiny_bert, silos, train={"dtype": "bfloat16"})
    with pytest.raises(JobError, match="base of rounded weights"):
        job_from(first, tiny_bert, silos, model={"quantize": "8bit"})


def test_another_start_has_a_digest_of_its_own(first: Path, tiny_bert: Path, silos: Path) -> None:
    job = job_from(first, tiny_bert, silos, model={"adapter_digest": "0" * 64})
    assert job.override(["model.adapter=elsewhere"]).model.adapter_digest is None
    assert job.override(["model.adapter="]).model.adapter_digest is None
    assert job.override(["run.rounds=9"]).model.adapter_digest == "0" * 64


def test_sites_do_not_start_from_a_path_of_the_servers(
    first: Path, tiny_bert: Path, silos: Path
) -> None:
    job = job_from(first, tiny_bert, silos, data={"labels": ["negative", "positive"]})
    with pytest.raises(JobError, match=r"a directory of this machine.*export --merge"):
        deployable(job)


def test_an_adapter_as_the_model_is_told_of_the_key(
    first: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedgroveError, match=r"the adapter as model\.adapter"):
        run(tiny_job(first, silos), tmp_path / "out")
