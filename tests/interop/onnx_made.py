"""Writes a language model as a quantised ONNX file, as far as its weights go: what the reader is
tested on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def initialiser(name: str, array: np.ndarray, *, raw: bool = True) -> bytes:
    kind = {np.float32: 1, np.uint8: 2, np.int8: 3}[array.dtype.type]
    head = b"".join(field(1, size) for size in array.shape) + field(2, kind) + field(8, name)
    if raw:
        return head + field(9, array.tobytes())
    if kind == 1:
        return head + field(4, array.tobytes())
    return head + field(5, b"".join(varint(int(value)) for value in array.flat))


def node(name: str, operator: str, inputs: list[str]) -> bytes:
    return b"".join(field(1, each) for each in inputs) + field(3, name) + field(4, operator)


def save_onnx(file: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round the matrices to int8 (the embedding to uint8), write them, and give back what they then
    stand for.
    """
    parts, expected = [field(1, 8)], {}
    body = []
    for number, (name, value) in enumerate(weights.items()):
        array = value.to(torch.float32).numpy()
        if name.endswith("norm.weight"):
            body.append(field(5, initialiser(name, array)))
            expected[name] = value.to(torch.float32)
            continue
        embedding = name == "model.embed_tokens.weight"
        kind, zero = (np.uint8, 128) if embedding else (np.int8, -3 if number % 2 else 0)
        scale = np.float32(np.abs(array).max() / 120)
        whole = np.clip(
            np.round(array / scale) + zero, np.iinfo(kind).min, np.iinfo(kind).max
        ).astype(kind)
        expected[name] = torch.from_numpy((whole.astype(np.float32) - zero) * scale)
        stem = name if embedding else f"onnx::MatMul_{number}"
        stored = whole if embedding else np.ascontiguousarray(whole.T)
        body += [
            field(5, initialiser(f"{stem}_scale", np.array(scale), raw=False)),
            field(5, initialiser(f"{stem}_zero_point", np.array(zero, kind), raw=False)),
            field(5, initialiser(f"{stem}_quantized", stored)),
        ]
        if not embedding:
            module = "/" + name.removesuffix(".weight").replace("layers.", "layers#").replace(
                ".", "/"
            )
            inputs = ["x_quantized", f"{stem}_quantized", "x_zero_point", f"{stem}_zero_point"]
            body.append(
                field(1, node(module.replace("#", ".") + "/MatMul_quant", "MatMulInteger", inputs))
            )
    parts.append(field(7, b"".join(body)))
    file.write_bytes(b"".join(parts))
    return expected
