"""Adapters for llama.cpp, read back by gguf's own reader, and what no GGUF adapter can say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import save_bert, tiny_job
from tests.use.test_after import said
from tests.use.test_foreign import trained

import fedgrove as fg
from fedgrove.ground.errors import RunError

gguf = pytest.importorskip("gguf")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: llama.cpp's names of the layers of a block
THEIRS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, tensors in numpy's order of axes)."""
    reader = gguf.GGUFReader(path)
    told = {name: field.contents() for name, field in reader.fields.items()}
    return told, {each.name: np.array(each.data, np.float64) for each in reader.tensors}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """[out, in] as llama.cpp has queries and keys: of each head row i of the first half, then row i
    of the second, by hand.
    """
    size = rows.shape[0] // heads
    order = []
    for head in range(heads):
        for i in range(size // 2):
            order += [head * size + i, head * size + size // 2 + i]
    return rows[order]


def base_of(architecture: str, llama: Path, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config

    if architecture == "llama":
        return AutoModelForCausalLM.from_pretrained(str(llama))
    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[architecture]
    tokenizer = AutoTokenizer.from_pretrained(str(llama))
    config = kind(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return AutoModelForCausalLM.from_pretrained(str(folder))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"k_proj": 5}}]
)
def test_base_and_gguf_adapter_are_the_merged_model(
    architecture: str, patterns: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    model = base_of(architecture, tiny_llama, tmp_path / "base")
    plain = {name: value.double().numpy() for name, value in model.state_dict().items()}
    trained(model, tmp_path / "theirs", "CAUSAL_LM", ALL, **patterns)
    out = tmp_path / "adapter.gguf"
    assert said("export", str(tmp_path / "theirs"), "--to", "gguf", "--out", str(out))
    told, tensors = read(out)
    assert told["general.type"] == "adapter"
    assert told["general.architecture"] == architecture
    assert told["adapter.type"] == "lora"
    assert len(tensors) == 2 * 2 * len(ALL)

    said("export", str(tmp_path / "theirs"), "--merge", "--out", str(tmp_path / "merged"))
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    whole = {name: value.double().numpy() for name, value in merged.state_dict().items()}
    heads = {"attn_q": 4, "attn_k": 2} if architecture == "llama" else {}
    for layer in range(2):
        for ours, theirs in THEIRS.items():
            name = f"model.layers.{layer}.{ours}.weight"
            a = tensors[f"blk.{layer}.{theirs}.weight.lora_a"]
            b = tensors[f"blk.{layer}.{theirs}.weight.lora_b"]
            before, after = plain[name], whole[name]
            if theirs in heads:
                before, after = (interleaved(each, heads[theirs]) for each in (before, after))
            found = before + told["adapter.lora.alpha"] / b.shape[1] * b @ a
            np.testing.assert_allclose(found, after, atol=1e-6)
            assert np.abs(after - before).max() > 0.01
    with pytest.raises(RunError, match="exists already; name a new file"):
        said("export", str(tmp_path / "theirs"), "--to", "gguf", "--out", str(out))


def test_a_client_of_a_run_is_written_too(
    tiny_llama: Path, exchanges: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_llama,
        exchanges,
        data={"task": "generate"},
        run={"rounds": 1, "out": str(tmp_path / "run")},
    )
    client = fg.run(job).client("site-0")
    out = client.export(tmp_path / "a.gguf", to="gguf")
    told, tensors = read(out)
    assert told["adapter.lora.alpha"] == 8
    assert all(value.shape[0] == 4 for name, value in tensors.items() if name.endswith("lora_a"))
    small = client.export(tmp_path / "b.gguf", to="gguf", rank=2)
    assert min(value.shape[0] for value in read(small)[1].values()) == 2


def test_what_no_gguf_adapter_can_say_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    bert = save_bert(tmp_path / "bert")
    model: Any = AutoModelForSequenceClassification.from_pretrained(str(bert))
    trained(model, tmp_path / "classifier", "SEQ_CLS", ["query"])
    out = str(tmp_path / "x.gguf")
    with pytest.raises(RunError, match="is a classifier, and a GGUF adapter has no head"):
        said("export", str(tmp_path / "classifier"), "--to", "gguf", "--out", out)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    trained(model, tmp_path / "writer", "CAUSAL_LM", ["q_proj"])
    asked = ("export", str(tmp_path / "writer"), "--to")
    with pytest.raises(RunError, match=r"name a file that ends in \.gguf"):
        said(*asked, "gguf", "--out", str(tmp_path / "x"))
    with pytest.raises(RunError, match="--merge writes a whole model, --to gguf an adapter"):
        said(*asked, "gguf", "--merge", "--out", out)
    with pytest.raises(RunError, match="give peft, gguf or vllm"):
        said(*asked, "onnx", "--out", out)
    config = json.loads((tiny_llama / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    config |= {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="is an adapter of GemmaForCausalLM; --to gguf knows Llama"):
        said(*asked, "gguf", "--base", str(other), "--out", out)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    model.config.tie_word_embeddings = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT saves the base's layer too, and says so
        trained(model, tmp_path / "output", "CAUSAL_LM", ["lm_head"])
    with pytest.raises(RunError, match=r"adapts 'lm_head', for which llama\.cpp's llama takes no"):
        said("export", str(tmp_path / "output"), "--to", "gguf", "--out", out)
    assert not Path(out).exists()
    assert not list(tmp_path.glob("*.partial"))


def test_its_package_is_asked_for(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    trained(model, tmp_path / "writer", "CAUSAL_LM", ["q_proj"])
    monkeypatch.setattr("fedgrove.use.exporting.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"needs the package gguf: pip install 'fedgrove\[gguf\]'"):
        said("export", str(tmp_path / "writer"), "--to", "gguf", "--out", str(tmp_path / "x.gguf"))
    assert torch.is_tensor(next(model.parameters()))
