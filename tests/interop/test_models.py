"""Bases of several architectures: which layers are adapted, and what is said where that is not
possible.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import WORDS, save_vit, sentences, tiny_job, unclipped
from torch import nn

import fedgrove as fg
from fedgrove.adapters import Assembly, Term, fresh
from fedgrove.federation.tasks import ClassifyText
from fedgrove.ground.errors import ModelError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import (
    SHIFTED,
    first_position,
    load_base,
    load_config,
    longest_input,
)
from fedgrove.interop.targets import find_sites, layer_index
from fedgrove.job import Job
from fedgrove.start import run
from fedgrove.training.kernel import Kernel

SIZE: Any = {"vocab_size": len(WORDS), "max_position_embeddings": 64}
SMALL: Any = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def configs() -> dict[str, Any]:
    import transformers as t

    return {
        "llama": t.LlamaConfig(**SIZE, **SMALL, num_key_value_heads=2, pad_token_id=0),
        "opt": t.OPTConfig(
            **SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
            pad_token_id=0,
        ),
        "roberta": t.RobertaConfig(**SIZE, **SMALL, pad_token_id=0),
        "distilbert": t.DistilBertConfig(**SIZE, dim=32, n_layers=2, n_heads=4, hidden_dim=64, pad_token_id=0),
        "gpt2": t.GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=32, n_layer=2, n_head=4),
        "gpt_neox": t.GPTNeoXConfig(**SIZE, **SMALL),
    }  # fmt: skip


def save(kind: str, folder: Path, tiny_bert: Path) -> Path:
    from transformers import AutoModel

    shutil.copytree(tiny_bert, folder, ignore=shutil.ignore_patterns("model*", "config.json"))
    torch.manual_seed(0)
    AutoModel.from_config(configs()[kind]).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("llama", {"q_proj", "v_proj"}),
        ("opt", {"q_proj", "v_proj"}),
        ("roberta", {"query", "value"}),
        ("distilbert", {"q_lin", "v_lin"}),
        ("gpt2", {"c_attn"}),
        ("gpt_neox", {"query_key_value"}),
    ],
)
def test_query_and_value_are_found_whatever_they_are_called(
    kind: str, ends: set[str], tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """And a federation runs on them; the exported adapter gives the run's logits in PEFT."""
    model = save(kind, tmp_path / kind, tiny_bert)
    base = load_base(str(model))
    assert {site.name.rsplit(".", 1)[-1] for site in base.sites.values()} == ends
    assert [site.layer for site in base.sites.values()] == sorted([0, 1] * len(ends))
    result = run(tiny_job(model, silos, run={"rounds": 1}), tmp_path / "run")
    texts = [row["text"] for row in sentences(5, seed=1)]
    ours = result.client("site-0").model().logits(texts)
    assert (
        in_peft(model, tmp_path / "run" / "adapters" / "site-0", texts) - ours
    ).abs().max() <= 1e-5


def in_peft(model: Path, folder: Path, texts: list[str]) -> torch.Tensor:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    peft = PeftModel.from_pretrained(AutoModel.from_pretrained(str(model)), str(folder)).eval()
    batch = AutoTokenizer.from_pretrained(str(model))(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        hidden = peft(**batch).last_hidden_state
    mask, head = batch["attention_mask"][..., None], load_file(folder / "head.safetensors")
    pooled: torch.Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return pooled @ head["weight"].T + head["bias"]


def test_every_linear_layer(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """Of the numbered layers: no embedding, no pooler, no head."""
    job = tiny_job(tiny_bert, silos, lora={"targets": "all-linear"}, run={"rounds": 1})
    assert Job.parse(job.to_toml()) == job
    result = run(job, tmp_path / "run")
    model = result.client("site-0").model()
    assert len(model.kernel.base.sites) == 2 * 6
    texts = [row["text"] for row in sentences(5, seed=1)]
    peft = in_peft(tiny_bert, tmp_path / "run" / "adapters" / "site-0", texts)
    assert (peft - model.logits(texts)).abs().max() <= 1e-5


def test_a_layer_that_is_held_transposed(
    tiny_bert: Path, silos: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """GPT-2's Conv1D: sides, folding into its weights, PEFT's fan_in_fan_out, merging."""
    folder = save("gpt2", tmp_path / "gpt2", tiny_bert)
    base = load_base(str(folder), dtype=torch.float64)
    assert all(site.transposed for site in base.sites.values())
    assert {(s.in_features, s.out_features) for s in base.sites.values()} == {(32, 96)}
    kernel = Kernel(base, ClassifyText(("negative", "positive"), max_length=32), unclipped())
    examples = kernel.task.encode(sentences(6, seed=3), base.processor)
    adapter = {
        name: factors.map(lambda value: value + 0.05)
        for name, factors in fresh(base.sites, 3, 0.5, generator(0), dtype=torch.float64).items()
    }
    beside = kernel.features(examples, Assembly((Term("own", adapter, train=""),)))
    inside = kernel.features(examples, Assembly(folded=adapter))
    untouched = kernel.features(examples)
    assert torch.allclose(beside, inside, atol=1e-12)
    assert not torch.allclose(beside, untouched, atol=1e-3)
    kernel.close()
    result = run(tiny_job(folder, silos, run={"rounds": 1}), tmp_path / "run")
    site = result.client("site-0")
    config = json.loads((site.path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    texts = ["good fine day", "bad poor film"]
    in_peft(folder, site.path, texts)
    assert not [each for each in recwarn if "fan_in_fan_out" in str(each.message)]
    site.export(tmp_path / "merged", merge=True)
    merged = fg.load(tmp_path / "merged").logits(texts)
    assert torch.allclose(merged, site.model().logits(texts), atol=1e-5)


def test_patterns_and_layers(tiny_bert: Path) -> None:
    base = load_base(
        str(tiny_bert), targets=["output.dense", "encoder.layer.0.*.key", "pooler.dense"]
    )
    names = list(base.sites)
    assert len(names) == 2 * 2 + 1 + 1
    assert base.sites["encoder.layer.1.output.dense"].layer == 1
    assert base.sites["pooler.dense"].layer == 2  # not in a numbered layer: one more on top
    with pytest.raises(ModelError, match="only Linear and Conv1D"):
        find_sites(base.model, ["LayerNorm"])
    assert layer_index("a.b") is None
    assert isinstance(base.model.get_submodule("encoder.layer.0.output.dense"), nn.Linear)


def test_gradient_checkpointing_changes_memory_not_numbers(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    plain = run(tiny_job(tiny_bert, silos), tmp_path / "plain")
    checked = run(
        tiny_job(tiny_bert, silos, train={"gradient_checkpointing": True}), tmp_path / "checked"
    )
    for name, row in plain.summary["clients"].items():
        assert row["loss"] == pytest.approx(checked.summary["clients"][name]["loss"], abs=1e-5)


def test_a_bfloat16_base_trains_and_reloads_to_its_own_measures(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    result = run(tiny_job(tiny_bert, silos, train={"dtype": "bfloat16"}), tmp_path / "run")
    model = result.client("site-0").model()
    assert model.kernel.base.dtype == torch.bfloat16
    assert result.client("site-0").evaluate()["loss"] == result.summary["clients"]["site-0"]["loss"]


def test_a_model_that_hides_patches_at_random_is_refused(tmp_path: Path) -> None:
    save_vit(tmp_path / "mae")
    config = json.loads((tmp_path / "mae" / "config.json").read_text())
    config |= {"model_type": "vit_mae", "mask_ratio": 0.75}
    (tmp_path / "mae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="hides patches at random"):
        load_base(str(tmp_path / "mae"), task="classify-images")


def test_a_model_of_the_wrong_kind_is_named(tiny_bert: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"reads text, not images; for data.task = 'classify-images' choose another",
    ):
        load_base(str(tiny_bert), task="classify-images")
    with pytest.raises(
        ModelError,
        match=r"'grove-vit' reads images, not text; for data.task = 'classify-text' choose",
    ):
        load_base("grove-vit", task="classify-text")


@pytest.mark.parametrize("kind", SHIFTED)
def test_the_first_position_is_what_the_model_itself_makes_of_a_text(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    name = "create_position_ids_from_input_ids"
    config = AutoConfig.for_model(kind, pad_token_id=5, max_position_embeddings=70)
    module = sys.modules[AutoModel._model_mapping[type(config)].__module__]
    places = [module, *(each for each in vars(module).values() if inspect.isclass(each))]
    positions = next(getattr(place, name) for place in places if hasattr(place, name))
    given: list[Any] = [torch.tensor([[7, 8, 9]]), 5]
    if "self" in inspect.signature(positions).parameters:
        given.insert(0, None)
    assert positions(*given)[0].tolist() == [6, 7, 8]
    assert first_position(config) == 6
    assert longest_input(config) == 64


def test_other_models_begin_at_nought() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("bert", pad_token_id=5, max_position_embeddings=70)
    assert first_position(config) == 0
    assert longest_input(config) == 70


def test_an_adapter_directory_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a model"):
        load_config(str(tmp_path))
