"""The result is usable elsewhere: PEFT and ``fedgrove.load`` give the run's own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import sentences, tiny_job

import fedgrove as fg
from fedgrove.adapters import Factors
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.interop.peft import read_adapter, save_adapter
from fedgrove.start import run
from fedgrove.use.personal import merge

TEXTS = [row["text"] for row in sentences(9, seed=42)]


def in_peft(model: Path, folder: Path, stock: bool) -> torch.Tensor:
    """Logits by PEFT alone, with the documented pooling for our head."""
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForSequenceClassification if stock else AutoModel
    base = kind.from_pretrained(str(model))
    peft = PeftModel.from_pretrained(base, str(folder)).eval()
    batch = AutoTokenizer.from_pretrained(str(model))(TEXTS, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        if stock:
            logits: torch.Tensor = peft(**batch).logits
            return logits
        hidden = peft(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    head = load_file(folder / "head.safetensors")
    return pooled @ head["weight"].T + head["bias"]


@pytest.mark.parametrize("method", ["local", "fedit", "ffa-lora", "fedsa-lora"])
@pytest.mark.parametrize("head", ["pooled", "stock"])
def test_peft_gives_the_same_logits(
    method: str, head: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert, silos, method={"name": method}, model={"head": head, "name": str(tiny_bert)}
    )
    result = run(job, tmp_path / "run")
    model = result.client("site-1").model()
    ours = model.logits(TEXTS)
    theirs = in_peft(tiny_bert, tmp_path / "run" / "adapters" / "site-1", head == "stock")
    assert (ours - theirs).abs().max() <= 1e-5
    assert (
        result.client("site-1").evaluate()["accuracy"]
        == result.summary["clients"]["site-1"]["metric"]
    )
    result.client("site-1").export(tmp_path / "merged", merge=True)
    assert (fg.load(tmp_path / "merged").logits(TEXTS) - ours).abs().max() <= 1e-5
    result.client("site-1").export(tmp_path / "copy")
    assert torch.equal(fg.load(tmp_path / "copy").logits(TEXTS), ours)
    with pytest.raises(RunError, match="exists already"):
        result.client("site-1").export(tmp_path / "copy")


def test_mixed_ranks_and_scales_survive_the_round_trip(tmp_path: Path) -> None:
    adapter = {
        "a.query": Factors(torch.randn(2, 6), torch.randn(5, 2), 0.3),
        "a.value": Factors(torch.randn(4, 6), torch.randn(7, 4), 1.0),
    }
    save_adapter(tmp_path / "x", adapter, base="b", head={}, head_kind="pooled", card={})
    back, head, config = read_adapter(tmp_path / "x")
    assert head == {}
    assert config["r"] == 4
    for site, factors in adapter.items():
        assert torch.equal(back[site].A, factors.A)
        assert back[site].scale == pytest.approx(factors.scale, abs=1e-15)


def broken(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def drop_b(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.a.query.lora_B.weight"]


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.a.query.lora_A.weight"][0, 0] = float("nan")


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.a.query.lora_A.weight"] = torch.zeros(3, 6)


@pytest.mark.parametrize(
    ("change", "words"), [(drop_b, "no lora_B"), (poison, "not finite"), (reshape, "do not fit")]
)
def test_damaged_adapters_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    adapter = {"a.query": Factors(torch.randn(2, 6), torch.randn(5, 2), 1.0)}
    save_adapter(tmp_path / "x", adapter, base="b", head={}, head_kind="pooled", card={})
    broken(tmp_path / "x", change)
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path / "x")


def test_a_cut_file_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    adapter = {"a.query": Factors(torch.randn(2, 6), torch.randn(5, 2), 1.0)}
    save_adapter(tmp_path / "x", adapter, base="b", head={}, head_kind="pooled", card={})
    file = tmp_path / "x" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="cut short"):
        read_adapter(tmp_path / "x")
    file.rename(tmp_path / "x" / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled"):
        read_adapter(tmp_path / "x")


def test_merge_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json does not exist"):
        merge(tmp_path, tmp_path / "out")


def test_the_configuration_is_the_same_in_every_process(tmp_path: Path) -> None:
    """PEFT keeps target modules in a set, whose order differs between processes."""
    adapter = {
        f"layer.{i}.query": Factors(torch.randn(2, 6), torch.randn(5, 2), 1.0) for i in range(12)
    }
    save_adapter(tmp_path / "x", adapter, base="b", head={}, head_kind="pooled", card={})
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(adapter)
