from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.onnx_made import save_onnx
from tests.tiny import save_llama, unclipped

from fedgrove.ground.errors import ModelError
from fedgrove.interop import embedded_models
from fedgrove.interop.embedded_models import CONVERTED, Converted, minimind, model_folder, smollm2
from fedgrove.interop.models import EMBEDDED_MODELS, load_base


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Any]:
    """A tiny Llama as MiniMind2-Small is packed, and the original."""
    from transformers import AutoModelForCausalLM

    folder = save_llama(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    source = tmp_path / "packed"
    source.mkdir()
    save_onnx(source / "model_quantized.onnx", model.state_dict())
    config = json.loads((folder / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((folder / name).read_bytes())
    (source / "special_tokens_map.json").write_text("{}")
    return source, model


def test_the_packed_model_becomes_an_ordinary_folder(
    packed: tuple[Path, Any], tmp_path: Path
) -> None:
    source, original = packed
    (tmp_path / "made").mkdir()
    minimind(source, tmp_path / "made")
    base = load_base(str(tmp_path / "made"), task="generate", head="lm")
    weights = base.model.state_dict()
    assert (
        weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    )  # tied
    for name, value in original.state_dict().items():
        assert (weights[name] - value).abs().max() <= value.abs().max() / 100, name
    ids = base.processor("what is good", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        near = torch.nn.functional.cosine_similarity(
            base.model(ids).logits, original(ids).logits, dim=-1
        )
    assert near.min() > 0.99


def test_weights_that_do_not_fit_are_refused(packed: tuple[Path, Any], tmp_path: Path) -> None:
    source, _ = packed
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (tmp_path / "made").mkdir()
    with pytest.raises(
        ModelError, match=r"do not fit their configuration \(first difference: model\.layers\.2"
    ):
        minimind(source, tmp_path / "made")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An embedded model whose conversion writes three empty files; the list counts the
    conversions.
    """
    done: list[str] = []

    def write(source: Path, folder: Path) -> None:
        done.append(source.name)
        if len(done) == 1 and (source / "broken").exists():
            (folder / "config.json").touch()
            raise ModelError("broken")
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).touch()

    (tmp_path / "toy-1.0").mkdir()
    monkeypatch.setitem(CONVERTED, "minimind2-small", Converted("up/stream", "a toy format", write))
    monkeypatch.setattr(embedded_models, "asset", lambda name: tmp_path / "toy-1.0")
    return done


def test_it_is_converted_once_for_all_who_ask(toy: list[str], tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(model_folder("minimind2-small")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "toy-1.0-model"] * 4
    assert toy == ["toy-1.0"]
    card = (found[0] / "README.md").read_text()
    assert "up/stream, restored from a toy format" in card
    assert "rounded" in card


def test_a_conversion_that_failed_is_done_again(toy: list[str], tmp_path: Path) -> None:
    (tmp_path / "toy-1.0" / "broken").touch()
    with pytest.raises(ModelError):
        model_folder("minimind2-small")
    assert not (tmp_path / "toy-1.0-model").exists()
    assert model_folder("minimind2-small").is_dir()
    assert len(toy) == 2


def test_gguf_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_models, "_installed", lambda package: False)
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install 'fedgrove\[gguf\]'"):
        smollm2(tmp_path, tmp_path)


def test_the_job_knows_the_embedded_models() -> None:
    from fedgrove.ground.errors import JobError
    from fedgrove.job import Job
    from fedgrove.job.sections import EMBEDDED_MODELS as NAMES

    assert set(CONVERTED) < set(EMBEDDED_MODELS) <= set(NAMES)
    with pytest.raises(JobError, match=r"model.revision = .* has no use with the embedded model"):
        Job.parse('[model]\nname = "minimind2-small"\nrevision = "main"')


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONVERTED))
def test_the_real_ones_answer(name: str) -> None:
    if name == "smollm2-135m":
        pytest.importorskip("gguf")
    from fedgrove.adapters.assembly import Assembly
    from fedgrove.federation.tasks.generate import Generate
    from fedgrove.training.kernel import Kernel

    base = load_base(name, task="generate", head="lm")
    task = Generate(max_new_tokens=24)
    rows = [
        {"prompt": "What is the capital of France?"},
        {"prompt": "Who wrote Hamlet, and when was that, roughly?"},
    ]
    answer = Kernel(base, task, unclipped()).generate(
        Assembly(), task.encode(rows, base.processor)
    )[0]
    assert "Paris" in answer
    assert (
        base.model.num_parameters()
        == {"minimind2-small": 25_829_888, "smollm2-135m": 134_515_008}[name]
    )


@pytest.mark.slow
def test_peft_computes_what_the_hooks_compute_on_minimind(tmp_path: Path) -> None:
    """float64, an adapter on query and value, exported and loaded by PEFT on the folder in the
    cache.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fedgrove.adapters.adapter import Factors
    from fedgrove.adapters.assembly import Assembly, Term
    from fedgrove.federation.tasks.generate import Generate
    from fedgrove.interop.peft import save_adapter
    from fedgrove.training.kernel import Kernel

    base = load_base("minimind2-small", task="generate", head="lm", dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    adapter = {
        name: Factors(
            torch.randn(4, site.in_features, generator=draw, dtype=torch.float64) * 0.05,
            torch.randn(site.out_features, 4, generator=draw, dtype=torch.float64) * 0.05,
            2.0,
        )
        for name, site in base.sites.items()
    }
    assert len(adapter) == 16
    task = Generate()
    examples = task.encode(
        [{"prompt": "What is the capital of France?"}, {"prompt": "Hi"}], base.processor
    )
    mine = Kernel(base, task, unclipped()).logits(
        Assembly((Term("own", adapter, train=""),)), examples
    )
    save_adapter(
        tmp_path / "a", adapter, base="x", head={}, head_kind="lm", card={"task": "generate"}
    )
    plain = AutoModelForCausalLM.from_pretrained(
        str(model_folder("minimind2-small")), dtype=torch.float64
    )
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "a")).eval()
    for example, logits in zip(examples, mine, strict=True):
        with torch.inference_mode():
            expected = theirs(torch.tensor([example["prompt_ids"]])).logits[0, -1]
        assert torch.allclose(logits, expected, atol=1e-9)
