"""A checkpoint that has a classifier already, of as many classes as the job's or of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.tiny import save_bert, save_llama, tiny_job
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    SwinConfig,
    ViTConfig,
)

import fedgrove as fg
from fedgrove.federation.tasks import TASKS
from fedgrove.federation.tasks.base import HeadedTask
from fedgrove.ground.errors import ModelError
from fedgrove.interop.models import load_base
from fedgrove.interop.stock_heads import as_stock
from fedgrove.tracking.callback import Callback
from fedgrove.use.exporting import export


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A tiny BERT with a head for three classes."""
    folder = save_bert(tmp_path / "bert")
    config = BertConfig.from_pretrained(str(folder), num_labels=3)
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(str(folder))
    return folder


def head_of(folder: Path, classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return load_base(str(folder), head="stock", classes=classes, seed=seed).stock_head


def test_a_head_of_as_many_classes_is_kept(classifier: Path) -> None:
    base = load_base(str(classifier), head="stock", classes=3)
    kept = load_file(str(classifier / "model.safetensors"))
    assert base.notes == ()
    assert torch.equal(base.stock_head["classifier.weight"], kept["classifier.weight"])


def test_a_head_of_others_is_drawn_anew_and_said(classifier: Path) -> None:
    base = load_base(str(classifier), head="stock", classes=2)
    assert base.notes == (
        f"The head of {classifier} is for 3 classes; for these 2 a new one is drawn.",
    )
    assert base.stock_head["classifier.weight"].shape == (2, 32)
    assert torch.equal(
        head_of(classifier, 2)["classifier.weight"], base.stock_head["classifier.weight"]
    )
    other = head_of(classifier, 2, seed=5)["classifier.weight"]
    assert not torch.equal(other, base.stock_head["classifier.weight"])
    kept = load_file(str(classifier / "model.safetensors"))
    key = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(base.model.state_dict()[key], kept[key])


def test_a_checkpoint_whose_body_does_not_fit_is_named(classifier: Path) -> None:
    weights = load_file(str(classifier / "model.safetensors"))
    key = "bert.encoder.layer.0.attention.self.query.weight"
    weights[key] = weights[key][:16].contiguous()
    save_file(weights, str(classifier / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"do not have the shapes .* \(encoder\.layer\.0\.attention"
    ):
        load_base(str(classifier), head="stock", classes=2)


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "intermediate_size": 48,
}
IMAGES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
}


@pytest.mark.parametrize(
    ("config", "auto", "level", "same"),
    [
        (BertConfig(**SMALL), "TokenClassification", "token", True),
        (RobertaConfig(**SMALL, pad_token_id=1), "TokenClassification", "token", True),
        (LlamaConfig(**SMALL), "TokenClassification", "token", True),
        (SwinConfig(**IMAGES, window_size=2), "ImageClassification", "example", True),
        (BertConfig(**SMALL), "SequenceClassification", "example", False),
        (LlamaConfig(**SMALL), "SequenceClassification", "example", False),
        (ModernBertConfig(**SMALL, pad_token_id=0), "TokenClassification", "token", False),
        (ViTConfig(image_size=32, **SMALL), "ImageClassification", "example", False),
        (SwinConfig(**IMAGES, window_size=2), "SequenceClassification", "example", False),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_pooled_head_is_a_stock_one_where_the_logits_are(
    config: Any, auto: str, level: str, same: bool
) -> None:
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_config(config).eval()
    width = getattr(config, "hidden_size", 0)
    head = {"weight": torch.randn(3, width), "bias": torch.randn(3)}
    kind = getattr(transformers, f"AutoModelFor{auto}")
    name = "classify-images" if hasattr(config, "image_size") else "classify-text"
    name = {"token": "tokens", "example": name}[level]
    task = TASKS.find(name).from_card({"labels": ["a", "b", "c"], "max_length": 16})
    assert isinstance(task, HeadedTask)
    found = as_stock(encoder, head, kind, task)
    assert (found is not None) == same
    if found is not None:
        assert found.config.num_labels == 3
        assert not any(name.endswith("pooler.dense.weight") for name in found.state_dict())


class Listener(Callback):
    """Keeps what a run remarks."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def remark(self, text: str) -> None:
        self.said.append(text)


def test_a_run_on_it_is_told_measured_loaded_and_merged(
    classifier: Path, silos: Path, tmp_path: Path
) -> None:
    listener = Listener()
    job = tiny_job(classifier, silos, model={"head": "stock"}, run={"rounds": 1})
    result = fg.run(job, tmp_path / "out", callbacks=[listener])
    assert [text for text in listener.said if "a new one is drawn" in text]
    site = result.client("site-0")
    assert site.evaluate()["loss"] == pytest.approx(site.summary["loss"], rel=1e-5)
    site.export(tmp_path / "merged", merge=True)
    texts = ["good fine day", "bad poor film"]
    alone = fg.load(tmp_path / "merged").logits(texts)
    assert torch.allclose(alone, site.model().logits(texts), atol=1e-5)


def without_pooler(folder: Path) -> Path:
    """A BERT that was saved without its pooler, as of masked language modelling."""
    save_bert(folder)
    weights = load_file(str(folder / "model.safetensors"))
    kept = {name: value for name, value in weights.items() if "pooler" not in name}
    save_file(kept, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


MODELS = {"bert": save_bert, "pooler": without_pooler, "llama": save_llama}


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        ("bert", "local"),
        ("bert", "shared"),
        ("bert", "frozen"),
        ("pooler", "frozen"),
        ("llama", "local"),
    ],
)
def test_peft_alone_gives_the_reported_model_whatever_the_policy(
    model: str, policy: str, silos: Path, tmp_path: Path
) -> None:
    """Only PEFT's two files, and the Auto class of the task."""
    from peft import AutoPeftModelForSequenceClassification

    base = MODELS[model](tmp_path / "base")
    job = tiny_job(
        base, silos, model={"head": "stock"}, federation={"head": policy}, run={"rounds": 1}
    )
    result = fg.run(job, tmp_path / "out")
    texts = ["good fine day", "bad poor film was sad"]
    batch = AutoTokenizer.from_pretrained(str(base))(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    drawn = []
    for name in ("site-0", "site-1"):
        client = result.client(name)
        assert client.evaluate()["loss"] == pytest.approx(client.summary["loss"], rel=1e-5)
        folder = tmp_path / name
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(client.path / file, folder / file)
        torch.manual_seed(99)  # what the checkpoint lacks must not be drawn again
        plain = AutoPeftModelForSequenceClassification.from_pretrained(str(folder)).eval()
        with torch.no_grad():
            found = plain(**batch).logits
        torch.testing.assert_close(found, client.model().logits(texts), atol=1e-5, rtol=1e-5)
        drawn.append(load_file(str(folder / "adapter_model.safetensors")))
    heads = [name for name in drawn[0] if ".lora_" not in name]
    assert any("pooler" in name for name in heads) == (model == "pooler")
    alike = all(torch.equal(drawn[0][name], drawn[1][name]) for name in heads)
    assert alike == (policy != "local")


def test_a_checkpoint_that_lacks_a_layer_is_named(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert")
    weights = load_file(str(folder / "model.safetensors"))
    kept = {name: value for name, value in weights.items() if "layer.1.output.dense" not in name}
    save_file(kept, str(folder / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights of its layers \(bert\.encoder\.layer\.1"):
        load_base(str(folder), head="stock", classes=2)


def test_what_is_drawn_below_the_head_is_told_trained_and_exported(
    silos: Path, tmp_path: Path
) -> None:
    base = without_pooler(tmp_path / "base")
    listener = Listener()
    job = tiny_job(base, silos, model={"head": "stock"}, run={"rounds": 1})
    result = fg.run(job, tmp_path / "out", callbacks=[listener])
    assert [text for text in listener.said if "has no 'bert.pooler.dense'; a new one" in text]
    client = result.client("site-0")
    wanted = client.model().logits(["good day"])
    client.export(tmp_path / "merged", merge=True)
    assert torch.allclose(fg.load(tmp_path / "merged").logits(["good day"]), wanted, atol=1e-5)
    plain = tmp_path / "plain"
    shutil.copytree(client.path, plain)
    (plain / "fedgrove.json").unlink()  # as anybody's directory
    assert torch.allclose(fg.load(plain).logits(["good day"]), wanted, atol=1e-5)
    export(plain, tmp_path / "again")
    assert torch.allclose(fg.load(tmp_path / "again").logits(["good day"]), wanted, atol=1e-5)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier"]
