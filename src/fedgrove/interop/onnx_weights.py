"""The weights of a quantised ONNX language model as PyTorch calls them. No ONNX library: only
initialisers are read.

An ONNX file is one protobuf message. Wanted are its tensors and which matrix product uses which of
them: the exporter names a product after the module that it came from
(``/model/layers.0/self_attn/q_proj/MatMul_quant``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgrove.ground.errors import ModelError

#: ONNX's numbers of element types -> numpy's, those that quantised models hold
_TYPES: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    10: np.float16,
}


@dataclass
class _Tensor:
    name: str = ""
    kind: int = 0
    shape: list[int] = field(default_factory=list)
    raw: bytes = b""
    floats: bytes = b""
    integers: list[int] = field(default_factory=list)

    def array(self) -> np.ndarray:
        kind = _TYPES[self.kind]
        if self.raw:
            return np.frombuffer(self.raw, kind).reshape(self.shape)
        if self.floats:
            return np.frombuffer(self.floats, np.float32).reshape(self.shape)
        return np.array(self.integers or [0], np.int64).astype(kind).reshape(self.shape)


def dequantised(file: Path) -> dict[str, Tensor]:
    """Parameters in float32 by their PyTorch names: ``model.layers.0.self_attn.q_proj.weight``,
    norms, embedding.

    An integer matrix ``W`` becomes ``(W - zero) · scale``, transposed as ``nn.Linear`` keeps it.
    The output layer is left out: where it is tied to the embedding, it is a second rounding of the
    same matrix. Raises ``ModelError`` for a file that is not such a model.
    """
    try:
        return _dequantised(file.read_bytes())
    except (IndexError, KeyError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise ModelError(
            f"{file.name} is not a quantised ONNX model as expected ({error})."
        ) from error


def _dequantised(data: bytes) -> dict[str, Tensor]:
    graph = next(
        (value for number, value in _fields(memoryview(data)) if number == 7), None
    )  # ModelProto.graph
    if graph is None:
        raise ValueError("it has no graph")
    tensors: dict[str, _Tensor] = {}
    products: dict[str, str] = {}  # module -> its matrix
    for number, value in _fields(graph):
        if number == 5:  # GraphProto.initializer
            tensor = _tensor(value)
            tensors[tensor.name] = tensor
        elif number == 1:  # GraphProto.node
            name, operator, inputs = _node(value)
            if operator == "MatMulInteger":
                products[name.strip("/").removesuffix("/MatMul_quant").replace("/", ".")] = inputs[
                    1
                ]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            found[name] = torch.from_numpy(tensor.array().astype(np.float32))
        elif name.endswith(".weight_quantized"):
            found[name.removesuffix("_quantized")] = torch.from_numpy(_scaled(tensors, name))
    for module, matrix in products.items():
        if module != "lm_head":
            found[f"{module}.weight"] = torch.from_numpy(
                np.ascontiguousarray(_scaled(tensors, matrix).T)
            )
    return found


def _scaled(tensors: dict[str, _Tensor], name: str) -> np.ndarray:
    stem = name.removesuffix("_quantized")
    whole, zero, scale = (
        tensors[key].array() for key in (name, f"{stem}_zero_point", f"{stem}_scale")
    )
    return (whole.astype(np.float32) - zero.astype(np.float32)) * scale


def _tensor(message: memoryview) -> _Tensor:
    tensor = _Tensor()
    for number, value in _fields(message):
        if number == 1:
            tensor.shape += _integers(value)
        elif number == 2:
            tensor.kind = value
        elif number == 4:
            tensor.floats = bytes(value)
        elif number == 5:
            tensor.integers += [_signed(each) for each in _integers(value)]
        elif number == 8:
            tensor.name = bytes(value).decode()
        elif number == 9:
            tensor.raw = bytes(value)
    return tensor


def _node(message: memoryview) -> tuple[str, str, list[str]]:
    """(name, operator, inputs)"""
    name = operator = ""
    inputs: list[str] = []
    for number, value in _fields(message):
        if number == 1:
            inputs.append(bytes(value).decode())
        elif number == 3:
            name = bytes(value).decode()
        elif number == 4:
            operator = bytes(value).decode()
    return name, operator, inputs


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: an int, or the bytes of what is longer."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if place + length > len(message):
            raise ValueError("it ends early")
        yield number, message[place : place + length]
        place += length


def _integers(value: int | memoryview) -> list[int]:
    if isinstance(value, int):
        return [value]
    found, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        found.append(number)
    return found


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
