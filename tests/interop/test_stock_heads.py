"""A checkpoint that has a classifier already, of as many classes as the job's or of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import save_bert, tiny_job
from transformers import BertConfig, BertForSequenceClassification

import fedgrove as fg
from fedgrove.ground.errors import ModelError
from fedgrove.interop.models import load_base
from fedgrove.tracking.callback import Callback


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
