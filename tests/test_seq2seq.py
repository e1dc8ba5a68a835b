"""A federation that learns to write with encoder-decoders: T5, BART and their kin, as others load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.test_generation import job_of
from tests.test_run import adapters, summary
from tests.tiny import PAIR_SIZES, exchanges, save_pairs, unclipped, without_reports
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import fedgrove as fg
from fedgrove.adapters import Assembly, Term, fresh
from fedgrove.federation.tasks import Generate
from fedgrove.federation.tasks.seq2seq import as_read
from fedgrove.ground.errors import DataError, FedgroveError, JobError, ModelError, RunError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import load_base
from fedgrove.methods import registry
from fedgrove.methods.contract import Step
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.loop import Clock
from fedgrove.use.result import Result

__all__ = ["virtual"]

KINDS = sorted(PAIR_SIZES)
PROMPT = "the film what is not good"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("pairs")
    return {kind: save_pairs(home / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module", params=["t5", "bart"])
def finished(
    models: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Result:
    silos = request.getfixturevalue("exchanges")
    job = job_of(models[request.param], silos, train={"local_steps": 12, "lr": 3e-2})
    with without_reports():
        return fg.run(job, tmp_path_factory.mktemp("runs") / request.param)


def kernel_of(folder: Path, **changes: Any) -> Kernel:
    base = load_base(str(folder), task="generate", head="lm", dtype=torch.float64)
    task = as_read(Generate(32, 6, 2), base.head)
    return Kernel(base, task, unclipped(batch_size=3, local_steps=3, lr=1e-2, **changes))


def assembly_of(kernel: Kernel, number: int) -> Assembly:
    draw = generator(number, "A")
    own = fresh(kernel.base.sites, 2, 0.7, draw, dtype=torch.float64)
    return Assembly((Term("own", own, train="AB"),))


def work_of(kernel: Kernel, number: int) -> Work:
    examples = kernel.task.encode(exchanges(7 + number, number), kernel.base.processor)
    return Work(Step(assembly_of(kernel, number)), examples, Clock(number, ("t",)))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_both_halves_are_adapted_and_numbered_through(
    models: dict[str, Path], kind: str
) -> None:
    base = kernel_of(models[kind]).base
    assert base.layers == (0, 1, 2, 3)
    for name, site in base.sites.items():
        assert (site.layer >= 2) == ("decoder" in name)
    of_the_decoder = [name for name in base.sites if "decoder" in name]
    assert len(base.sites) == 12, "query and value of self-attention and of cross-attention"
    assert len(of_the_decoder) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_logits_are_those_of_the_model_with_these_labels(
    models: dict[str, Path], kind: str
) -> None:
    kernel = kernel_of(models[kind])
    examples = kernel.task.encode(exchanges(5, 3), kernel.base.processor)
    batch = kernel.task.collate(examples, kernel.base.pad_id)
    kernel.close()
    with torch.no_grad():
        expected = kernel.base.model(**batch).loss
    again = kernel_of(models[kind])
    found = again.evaluate(Assembly(), examples)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-9)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What T5 computes in float32 whatever the model is in (norms, attention's shares) in its own
    precision.
    """
    from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        """[b, t, h] -> [b, t, h]."""
        variance = states.pow(2).mean(-1, keepdim=True)
        return self.weight * states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    for norm in (T5LayerNorm, MT5LayerNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cohort_is_its_members_one_by_one(models: dict[str, Path], kind: str) -> None:
    kernel = kernel_of(models[kind], optimizer="sgd")  # AdamW makes much of gradients near 0
    works = [work_of(kernel, number) for number in range(3)]
    assert all(map(kernel.joins, works))
    assert not kernel.hooked.packs
    alone = [kernel.work(work) for work in works]
    for one, other in zip(alone, kernel.train_together(works), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-9)
        for site, factors in one.assembly.term("own").adapter.items():
            theirs = other.assembly.term("own").adapter[site]
            assert factors.B.abs().max() > 0, site
            assert torch.allclose(factors.B, theirs.B, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_gradients_are_those_of_peft(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """One step of SGD on one batch, in float64."""
    from peft import LoraConfig, get_peft_model

    kernel = kernel_of(models[kind], optimizer="sgd", accumulation=1)
    kernel.options = kernel.options.model_copy(update={"local_steps": 1, "batch_size": 4})
    examples = kernel.task.encode(exchanges(4, 5), kernel.base.processor)
    before = assembly_of(kernel, 0)
    trained = kernel.work(Work(Step(before), examples, Clock(0, ("t",))))
    kernel.close()
    plain = AutoModelForSeq2SeqLM.from_pretrained(str(models[kind]), dtype=torch.float64)
    sites = sorted(kernel.base.sites)
    alpha: Any = 1.4
    theirs: Any = get_peft_model(plain, LoraConfig(r=2, lora_alpha=alpha, target_modules=sites))
    own = before.term("own").adapter
    weights = dict(theirs.named_parameters())
    for site, factors in own.items():
        for letter, value in (("A", factors.A), ("B", factors.B)):
            name = f"base_model.model.{site}.lora_{letter}.default.weight"
            weights[name].data = value.double().clone()
    batch = kernel.task.collate(examples, kernel.base.pad_id)
    theirs.eval()(**batch).loss.backward()
    after = trained.assembly.term("own").adapter
    for site in sites:
        gradient = weights[f"base_model.model.{site}.lora_B.default.weight"].grad
        expected = own[site].B - kernel.options.lr * gradient
        assert torch.allclose(after[site].B, expected, rtol=1e-9, atol=1e-14), site


def test_a_run_learns_and_is_measured_as_it_is_loaded(finished: Result) -> None:
    lines = [line for line in finished.metrics() if line["split"] == "test"]
    assert {"loss", "rouge_l", "rouge_1", "exact_match", "perplexity"} <= lines[0].keys()
    first, last = (sum(line["loss"] for line in lines if line["round"] == r) for r in (1, 3))
    assert last < first
    assert finished.summary["metric"] == "rouge_l"
    assert finished.summary["mean"] > 0
    one = finished.client("site-1")
    found = one.evaluate()
    assert found["loss"] == pytest.approx(one.summary["loss"], rel=1e-4)
    assert found["rouge_l"] == pytest.approx(one.summary["metric"], abs=1e-6)


def test_pefts_auto_class_loads_what_leaves_to_the_same_logits(
    finished: Result, tmp_path: Path
) -> None:
    folder = finished.path / "adapters" / "site-1"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    theirs: Any = AutoPeftModelForSeq2SeqLM.from_pretrained(str(folder)).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(config["base_model_name_or_path"])
    mine = fg.load(folder)
    start = torch.tensor([[mine.kernel.reader.language.start]])  # type: ignore[attr-defined]
    ids = tokenizer(PROMPT, return_tensors="pt")
    ids.pop("token_type_ids", None)
    with torch.no_grad():
        output = theirs(**ids, decoder_input_ids=start)
        written = theirs.generate(**ids, max_new_tokens=6, do_sample=False)
    assert torch.allclose(mine.logits([PROMPT]), output.logits[:, 0], atol=1e-5)
    (text,) = mine.generate([PROMPT], max_new_tokens=6)
    assert text == tokenizer.decode(written[0], skip_special_tokens=True)
    finished.client("site-1").export(tmp_path / "merged", merge=True)
    merged = fg.load(tmp_path / "merged")
    assert torch.allclose(merged.logits([PROMPT]), mine.logits([PROMPT]), atol=1e-5)
    plain = AutoModelForSeq2SeqLM.from_pretrained(str(tmp_path / "merged")).eval()
    with torch.no_grad():
        output = plain(**ids, decoder_input_ids=start)
    assert torch.allclose(mine.logits([PROMPT]), output.logits[:, 0], atol=1e-4)


def test_a_directory_of_pefts_own_is_loaded(finished: Result, tmp_path: Path) -> None:
    folder = finished.path / "adapters" / "site-0"
    theirs: Any = AutoPeftModelForSeq2SeqLM.from_pretrained(str(folder)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine = fg.load(tmp_path / "theirs")
    assert torch.allclose(mine.logits([PROMPT]), fg.load(folder).logits([PROMPT]), atol=1e-5)


def test_what_is_for_decoders_is_refused(finished: Result, tmp_path: Path) -> None:
    one = finished.client("site-0")
    with pytest.raises(RunError, match="encoder-decoder, and vLLM takes those of decoders"):
        one.export(tmp_path / "vllm", to="vllm")
    with pytest.raises(RunError, match="gguf"):
        one.export(tmp_path / "one.gguf", to="gguf")
    with pytest.raises(
        DataError, match="is a conversation, and an encoder-decoder reads one prompt"
    ):
        one.model().generate(
            [[{"role": "system", "content": "be"}, {"role": "user", "content": "a"}]]
        )


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_engines_give_the_same_bytes(
    models: dict[str, Path], exchanges: Path, tmp_path: Path, kind: str
) -> None:
    job = job_of(models[kind], exchanges, train={"cohort": 1}, run={"rounds": 2})
    with without_reports():
        fg.run(job, tmp_path / "local")
        run_on(FakeGrid(3), job, tmp_path / "flower")
    assert adapters(tmp_path / "local") == adapters(tmp_path / "flower")
    assert summary(tmp_path / "local") == summary(tmp_path / "flower")


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in registry.names() if name != "fedra"])
def test_every_method_learns_to_write(
    models: dict[str, Path], exchanges: Path, tmp_path: Path, method: str
) -> None:
    job = job_of(
        models["t5"],
        exchanges,
        method={"name": method},
        data={"generate_examples": 1},
        train={"local_steps": 2},
        run={"rounds": 3},
    )
    with without_reports():
        result = fg.run(job, tmp_path / "run")
    losses = [line["loss"] for line in result.metrics() if line["split"] == "test"]
    assert all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {"plain": "prompt", "completion": "completion"}}, "data.plain is for decoders"),
        ({"data": {"max_new_tokens": 80}, "kind": "bart"}, "data.max_new_tokens = 80 is more than"),
        ({"method": {"name": "fedra"}}, "FedRA leaves out layers, but .* is an encoder-decoder"),
        ({"data": {"task": "classify-text"}}, "is an encoder-decoder, which writes texts"),
    ],
)
def test_bad_jobs(
    models: dict[str, Path], exchanges: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    folder = models[changes.pop("kind", "t5")]
    if "task" in changes.get("data", {}):
        with pytest.raises(ModelError, match=sentence):
            load_base(str(folder))
        return
    with pytest.raises(JobError, match=sentence):
        fg.run(job_of(folder, exchanges, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_rows_of_which_nothing_is_left(models: dict[str, Path]) -> None:
    kernel = kernel_of(models["t5"])
    for row, what in (
        ({"prompt": " ", "completion": "it"}, "prompt"),
        ({"prompt": "a", "completion": " "}, "completion"),
    ):
        with pytest.raises(
            DataError, match=f"row 1 has a {what} that the tokenizer turns into nothing"
        ):
            kernel.task.encode([row], kernel.base.processor)


def test_a_checkpoint_that_does_not_write_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from shutil import copytree

    folder = copytree(models["bart"], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BartForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FedgroveError, match="does not write text"):
        load_base(str(folder), task="generate", head="lm")
