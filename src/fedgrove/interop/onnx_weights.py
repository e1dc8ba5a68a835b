"""The weights of a quantised ONNX language model as PyTorch calls them.

Wanted are the file's tensors and which matrix product uses which of them: the exporter names a
product after the module that it came from (``/model/layers.0/self_attn/q_proj/MatMul_quant``). What
reads the file is the package onnx, an extra, because one model needs it, once.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgrove.ground.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from onnx import GraphProto, TensorProto

Matrix = NDArray[np.float32]


def dequantised(file: Path) -> dict[str, Tensor]:
    """Parameters in float32 by their PyTorch names: ``model.layers.0.self_attn.q_proj.weight``,
    norms, embedding.

    An integer matrix ``W`` ``[in, out]`` becomes ``(W - zero) · scale``, transposed as ``nn.Linear``
    keeps it. The output layer is left out: where it is tied to the embedding, it is a second
    rounding of the same matrix. Raises ``ModelError`` for a file that is not such a model, and
    where the package onnx is missing.
    """
    if find_spec("onnx") is None:
        raise ModelError(
            f"{file.name} is read with the package onnx, once: pip install 'fedgrove[onnx]'."
        )
    try:
        return _parameters(_graph(file.read_bytes()))
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(
            f"{file.name} is not a quantised ONNX model as expected ({error})."
        ) from error


def _graph(data: bytes) -> GraphProto:
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        raise ValueError("it ends early or is damaged") from None
    if not model.HasField("graph"):
        raise ValueError("it has no graph")
    graph: GraphProto = model.graph
    return graph


def _parameters(graph: GraphProto) -> dict[str, Tensor]:
    """As ``dequantised``: norms [hidden], the embedding [vocabulary, hidden], matrices [out, in]."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            found[name] = torch.from_numpy(_array(tensor).astype(np.float32))
        elif name.endswith(".weight_quantized"):
            found[name.removesuffix("_quantized")] = torch.from_numpy(_scaled(tensors, name))
    for node in graph.node:
        module = node.name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")
        if node.op_type == "MatMulInteger" and module != "lm_head":
            matrix = _scaled(tensors, node.input[1]).T
            found[f"{module}.weight"] = torch.from_numpy(np.ascontiguousarray(matrix))
    return found


def _scaled(tensors: Mapping[str, TensorProto], name: str) -> Matrix:
    """``(W - zero) · scale`` of the integer matrix [rows, columns] that is called so."""
    stem = name.removesuffix("_quantized")
    whole = _array(tensors[name]).astype(np.float32)
    zero = _array(tensors[f"{stem}_zero_point"]).astype(np.float32)
    scale = _array(tensors[f"{stem}_scale"]).astype(np.float32)
    scaled: Matrix = (whole - zero) * scale
    return scaled


def _array(tensor: TensorProto) -> NDArray[np.generic]:
    """Its numbers, [any shape], in the file's type."""
    from onnx import numpy_helper

    array: NDArray[np.generic] = numpy_helper.to_array(tensor)
    return array
