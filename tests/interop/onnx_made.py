"""Writes a language model as a quantised ONNX file, as far as its weights go: what the reader is
tested on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor


def save_onnx(file: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round the matrices to int8 (the embedding to uint8), write them, and give back what they then
    stand for.
    """
    expected: dict[str, Tensor] = {}
    tensors, nodes = [], []
    for number, (name, value) in enumerate(weights.items()):
        array = value.to(torch.float32).numpy()
        if name.endswith("norm.weight"):
            tensors.append(numpy_helper.from_array(array, name))
            expected[name] = value.to(torch.float32)
            continue
        embedding = name == "model.embed_tokens.weight"
        kind = np.uint8 if embedding else np.int8
        zero = 128 if embedding else (-3 if number % 2 else 0)
        scale = np.float32(np.abs(array).max() / 120)
        limits = np.iinfo(kind)
        whole = np.clip(np.round(array / scale) + zero, limits.min, limits.max).astype(kind)
        expected[name] = torch.from_numpy((whole.astype(np.float32) - zero) * scale)
        stem = name if embedding else f"onnx::MatMul_{number}"
        stored = whole if embedding else np.ascontiguousarray(whole.T)
        code = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        tensors += [
            # Scalars as exporters write them: as numbers, where a matrix is raw bytes.
            helper.make_tensor(f"{stem}_scale", onnx.TensorProto.FLOAT, (), [float(scale)]),
            helper.make_tensor(f"{stem}_zero_point", code, (), [zero]),
            numpy_helper.from_array(stored, f"{stem}_quantized"),
        ]
        if not embedding:
            module = name.removesuffix(".weight").replace("layers.", "layers#").replace(".", "/")
            inputs = ["x_quantized", f"{stem}_quantized", "x_zero_point", f"{stem}_zero_point"]
            product = f"/{module.replace('#', '.')}/MatMul_quant"
            nodes.append(helper.make_node("MatMulInteger", inputs, ["y"], name=product))
    graph = helper.make_graph(nodes, "made", [], [], initializer=tensors)
    file.write_bytes(helper.make_model(graph).SerializeToString())
    return expected
