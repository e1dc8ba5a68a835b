from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from tests.interop.onnx_made import save_onnx

from fedgrove.ground.errors import ModelError
from fedgrove.interop import onnx_weights
from fedgrove.interop.onnx_weights import dequantised

WEIGHTS = {
    "model.embed_tokens.weight": torch.randn(7, 4),
    "model.layers.0.self_attn.q_proj.weight": torch.randn(6, 4),
    "model.layers.0.mlp.down_proj.weight": torch.randn(4, 9),
    "model.norm.weight": torch.randn(4),
}


def test_integers_become_what_they_stand_for(tmp_path: Path) -> None:
    expected = save_onnx(tmp_path / "model.onnx", WEIGHTS | {"lm_head.weight": torch.randn(7, 4)})
    del expected["lm_head.weight"]
    found = dequantised(tmp_path / "model.onnx")
    assert set(found) == set(WEIGHTS)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert (found[name] - WEIGHTS[name]).abs().max() <= WEIGHTS[name].abs().max() / 120


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x3a\x01\x0f"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx is not a quantised ONNX model as expected"):
        dequantised(tmp_path / "model.onnx")


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    save_onnx(tmp_path / "model.onnx", WEIGHTS)
    whole = (tmp_path / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"it ends early"):
        dequantised(tmp_path / "model.onnx")


def test_a_product_without_its_scale_is_refused(tmp_path: Path) -> None:
    save_onnx(tmp_path / "model.onnx", WEIGHTS)
    model = onnx.load_model(tmp_path / "model.onnx")
    kept = [tensor for tensor in model.graph.initializer if not tensor.name.endswith("_scale")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save_model(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"as expected \('model.embed_tokens.weight_scale'\)"):
        dequantised(tmp_path / "model.onnx")


def test_without_the_package_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_weights, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"package onnx.*fedgrove\[onnx\]"):
        dequantised(tmp_path / "model.onnx")
