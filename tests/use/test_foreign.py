"""Adapters that were not written by a run: loaded, asked, measured, merged, or told what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import sentences, tiny_job

import fedgrove as fg
from fedgrove.aggregate.aggregate import aggregate
from fedgrove.ground.errors import AdapterError
from fedgrove.use.exporting import export
from fedgrove.use.personal import merge

TEXTS = ["the good day", "a very sad film and book", "it was awful"]


def trained(model: Any, folder: Path, kind: str | None, targets: list[str], **options: Any) -> Any:
    """PEFT's model, its adapter and saved modules drawn at random, as it was saved."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type=kind, **options)
    found = get_peft_model(model, config).eval()
    torch.manual_seed(0)
    for name, value in found.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            value.data.normal_()
    found.save_pretrained(str(folder))
    return found


@pytest.fixture
def classifier(tiny_bert: Path, tmp_path: Path) -> tuple[Path, Any]:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_bert), num_labels=3)
    folder = tmp_path / "ordinary"
    return folder, trained(model, folder, "SEQ_CLS", ["query", "value"])


@torch.no_grad()
def logits_of(model: Any, bert: Path, texts: list[str]) -> torch.Tensor:
    """[texts, classes] by transformers alone."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(bert))(texts, padding=True, return_tensors="pt")
    found: torch.Tensor = model(**tokens).logits
    return found


def test_a_classifier_of_peft_has_its_own_head(
    tiny_bert: Path, classifier: tuple[Path, Any]
) -> None:
    folder, peft = classifier
    model = fg.load(folder)
    assert model.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    wanted = logits_of(peft, tiny_bert, TEXTS)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(model.logits(TEXTS), wanted, atol=1e-5, rtol=1e-5)
    named = fg.load(folder, labels=["bad", "good", "so-so"])
    numbers = wanted.argmax(-1).tolist()
    assert named.predict(TEXTS) == [("bad", "good", "so-so")[each] for each in numbers]
    rows = [{"text": text, "label": "good"} for text in TEXTS]
    assert named.evaluate(rows)["accuracy"] == pytest.approx(numbers.count(1) / 3)
    with pytest.raises(AdapterError, match="3 outputs; give 3 different labels"):
        fg.load(folder, labels=["bad", "good"])


def test_names_of_wrappers_and_rslora_are_understood(
    tiny_bert: Path, classifier: tuple[Path, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_bert), num_labels=2)
    folder = tmp_path / "wrapped"
    peft = trained(model, folder, "SEQ_CLS", ["query"], use_rslora=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({f"_orig_mod.{name}": value for name, value in tensors.items()}, file)
    torch.testing.assert_close(
        fg.load(folder).logits(TEXTS), logits_of(peft, tiny_bert, TEXTS), atol=1e-5, rtol=1e-5
    )


def test_dora_is_understood(tiny_bert: Path, tmp_path: Path) -> None:
    """As PEFT wrote it; its magnitudes are not those of the base."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_bert), num_labels=2)
    folder = tmp_path / "dora"
    peft = trained(model, folder, "SEQ_CLS", ["query", "dense"], use_dora=True)
    for name, value in peft.named_parameters():
        if "magnitude" in name:
            value.data *= torch.linspace(0.5, 1.5, len(value))
    peft.save_pretrained(str(folder))
    wanted = logits_of(peft, tiny_bert, TEXTS)
    torch.testing.assert_close(fg.load(folder).logits(TEXTS), wanted, atol=1e-5, rtol=1e-5)
    export(folder, tmp_path / "tidy")
    torch.testing.assert_close(
        fg.load(tmp_path / "tidy").logits(TEXTS), wanted, atol=1e-5, rtol=1e-5
    )
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {n: v for n, v in tensors.items() if "0.attention.self.query.lora_mag" not in n}, file
    )
    with pytest.raises(
        AdapterError, match=r"use_dora is True in adapter_config\.json, which is not"
    ):
        fg.load(folder)


def test_it_can_be_merged(tiny_bert: Path, classifier: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder, peft = classifier
    wanted = logits_of(peft, tiny_bert, TEXTS)
    merge(folder, tmp_path / "merged")
    whole = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged")).eval()
    torch.testing.assert_close(logits_of(whole, tiny_bert, TEXTS), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        fg.load(tmp_path / "merged").logits(TEXTS), wanted, atol=1e-5, rtol=1e-5
    )


def test_what_aggregate_writes_is_loaded(
    tiny_bert: Path, classifier: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = classifier
    aggregate("fedit", [folder], tmp_path / "out")
    with_head = fg.load(tmp_path / "out" / "_global")
    torch.testing.assert_close(
        with_head.logits(TEXTS), fg.load(folder).logits(TEXTS), atol=1e-5, rtol=1e-5
    )


def test_our_own_heads_come_back_from_aggregate(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos, run={"rounds": 1, "out": str(tmp_path / "run")})
    result = fg.run(job)
    folder = result.client("site-0").path
    aggregate("fedit", [folder], tmp_path / "out")
    model = fg.load(tmp_path / "out" / "_global")
    assert model.labels == ("negative", "positive")
    torch.testing.assert_close(
        model.logits(TEXTS), fg.load(folder).logits(TEXTS), atol=1e-5, rtol=1e-5
    )


def test_without_a_head_it_says_what_is_missing_and_is_merged(
    tiny_bert: Path, classifier: tuple[Path, Any], tmp_path: Path
) -> None:
    from transformers import AutoModel

    folder, peft = classifier
    aggregate("fedit", [folder], tmp_path / "out", options=["heads=leave"])
    bare = tmp_path / "out" / "_global"
    model = fg.load(bare)
    for ask in (model.predict, model.logits):
        with pytest.raises(AdapterError, match="has no head that was trained"):
            ask(TEXTS)
    with pytest.raises(AdapterError, match="has no head"):
        model.evaluate(sentences(4, seed=0))
    merge(bare, tmp_path / "merged")
    name = "encoder.layer.1.attention.self.query.weight"
    merged = AutoModel.from_pretrained(str(tmp_path / "merged")).state_dict()[name]
    plain = AutoModel.from_pretrained(str(tiny_bert)).state_dict()[name]
    layer = peft.base_model.model.bert.encoder.layer[1].attention.self.query
    torch.testing.assert_close(merged, plain + layer.get_delta_weight("default"))
    assert fg.load(tmp_path / "merged").headless


def test_a_language_model_of_peft_writes(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    trained(model, tmp_path / "writer", "CAUSAL_LM", ["q_proj", "v_proj"])
    loaded = fg.load(tmp_path / "writer")
    (text,) = loaded.generate(["what is not good"], max_new_tokens=3)
    (bare,) = fg.load(tmp_path / "writer").logits(["what is not good"])
    assert isinstance(text, str)
    assert torch.isfinite(bare).all()


def test_a_reader_of_peft_answers_questions(tiny_bert: Path, tmp_path: Path) -> None:
    """Beside PEFT's base_model: its own forward does not hand token_type_ids on."""
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    model = AutoModelForQuestionAnswering.from_pretrained(str(tiny_bert))
    theirs = trained(model, tmp_path / "reader", "QUESTION_ANS", ["query", "value"])
    asked = {"question": "what was it", "context": "the good day was very bad"}
    loaded = fg.load(tmp_path / "reader")
    (answer,) = loaded.predict([asked])
    assert answer["answer"] == asked["context"][answer["start"] : answer["end"]]
    tokens = AutoTokenizer.from_pretrained(str(tiny_bert))(*asked.values(), return_tensors="pt")
    with torch.no_grad():
        found = theirs.base_model(**tokens)
    wanted = torch.stack([found.start_logits, found.end_logits], -1)
    torch.testing.assert_close(loaded.logits([asked]), wanted, atol=1e-5, rtol=1e-5)


def test_whole_modules_of_a_language_model_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    options = {"modules_to_save": ["model.norm"]}
    trained(model, tmp_path / "writer", "CAUSAL_LM", ["q_proj"], **options)
    with pytest.raises(AdapterError, match=r"whole trained modules beside its LoRA \(model.norm"):
        fg.load(tmp_path / "writer")


def test_another_task_and_another_base_are_refused_in_a_sentence(
    classifier: tuple[Path, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    import json

    folder, _ = classifier
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "task_type": "TOKEN_CLS"}))
    with pytest.raises(AdapterError, match="task_type is 'TOKEN_CLS', and nothing says which tags"):
        fg.load(folder)
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match="names no base model"):
        fg.load(folder)
    with pytest.raises(AdapterError, match=r"of another model than .*, which has no layer"):
        fg.load(folder, base=str(tiny_llama))
    with pytest.raises(AdapterError, match="is not an adapter directory"):
        fg.load(tmp_path)
