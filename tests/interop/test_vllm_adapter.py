"""What vLLM loads: its rules, written down here, and the same model by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny import save_bert, tiny_job
from tests.use.test_after import said
from tests.use.test_foreign import trained

import fedgrove as fg
from fedgrove.adapters.adapter import Factors
from fedgrove.ground.errors import RunError
from fedgrove.interop.vllm_adapter import RANKS, even

TEXTS = ["what is not good", "a day the film"]


def served(folder: Path) -> dict[str, torch.Tensor]:
    """The update of each site, ``[out, in]`` in float64, as vLLM computes it: one scale from ``r``
    and ``lora_alpha``, whatever the patterns say. Fails where vLLM would refuse.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert config["bias"] == "none"
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        assert ".lora_A." in name or ".lora_B." in name
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            assert a.shape[0] <= config["r"]
            found[name.split(".lora_")[0]] = scale * b.double() @ a.double()
    return found


def delta(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The same by PEFT itself."""
    from peft import PeftModel

    found = PeftModel.from_pretrained(model, str(folder))
    return {
        name: layer.get_delta_weight("default").double()
        for name, layer in found.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


PATTERNS: list[dict[str, Any]] = [
    {},
    {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 9}},  # one scale
    {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_one_rank_and_scale_and_the_same_update(
    patterns: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    trained(model, tmp_path / "theirs", "CAUSAL_LM", ["q_proj", "v_proj"], **patterns)
    wanted = delta(AutoModelForCausalLM.from_pretrained(str(tiny_llama)), tmp_path / "theirs")
    out = tmp_path / "out"
    words = said("export", str(tmp_path / "theirs"), "--to", "vllm", "--out", str(out))
    assert "max_lora_rank = 8 or more" in words
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    found = served(out)
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert update.abs().max() > 0.1
        torch.testing.assert_close(found[name], update, atol=1e-6, rtol=1e-6)
    if patterns:
        plain = tmp_path / "plain"
        said("export", str(tmp_path / "theirs"), "--out", str(plain))
        alike = [torch.allclose(served(plain)[name], each) for name, each in wanted.items()]
        assert all(alike) == ("q_proj" not in patterns["alpha_pattern"])


@pytest.mark.parametrize("method", ["fedit", "flora", "fed-plora"])
def test_a_run_leaves_what_is_served(
    method: Literal["fedit", "flora", "fed-plora"],
    tiny_llama: Path,
    exchanges: Path,
    tmp_path: Path,
) -> None:
    job = tiny_job(
        tiny_llama,
        exchanges,
        data={"task": "generate"},
        method={"name": method},
        run={"rounds": 2, "out": str(tmp_path / "run")},
    )
    client = fg.run(job).client("site-0")
    out = client.export(tmp_path / "out", to="vllm")
    assert served(out).keys() == served(client.path).keys()
    torch.testing.assert_close(
        fg.load(out).logits(TEXTS), client.model().logits(TEXTS), atol=1e-5, rtol=1e-5
    )


def test_zeros_add_nothing_and_one_scale_stays_exact() -> None:
    torch.manual_seed(0)
    small = Factors(torch.randn(2, 5), torch.randn(4, 2), 2.0)
    large = Factors(torch.randn(3, 5), torch.randn(4, 3), 2.0)
    found = even({"a": small, "b": large})
    assert {each.rank for each in found.values()} == {3}
    assert torch.equal(found["b"].A, large.A)
    assert torch.equal(found["a"].A[:2], small.A)
    assert torch.equal(found["a"].B[:, :2], small.B)
    assert not found["a"].A[2:].any()
    assert not found["a"].B[:, 2:].any()
    assert {each.scale for each in found.values()} == {2.0}


def test_what_vllm_does_not_load_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    bert = save_bert(tmp_path / "bert")
    model: Any = AutoModelForSequenceClassification.from_pretrained(str(bert))
    trained(model, tmp_path / "classifier", "SEQ_CLS", ["query"])
    out = ("--to", "vllm", "--out", str(tmp_path / "out"))
    with pytest.raises(RunError, match="vLLM takes no adapter with a head; --to vllm is for"):
        said("export", str(tmp_path / "classifier"), *out)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    trained(model, tmp_path / "wide", "CAUSAL_LM", ["q_proj"], rank_pattern={"q_proj": 600})
    with pytest.raises(RunError, match=r"has rank 600, above .* add --rank 512 or less"):
        said("export", str(tmp_path / "wide"), *out)
    assert tuple(sorted(RANKS)) == RANKS
    assert not (tmp_path / "out").exists()
    words = said("export", str(tmp_path / "wide"), "--rank", "20", *out)
    assert "Truncated to rank 20" in words
    assert "max_lora_rank = 32 or more" in words
