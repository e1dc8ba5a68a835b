"""A frozen base in 8 or 4 bits, by bitsandbytes. Adapters, side paths and heads stay in the
adapters' precision.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from fedgrove.ground.errors import ModelError
from fedgrove.ground.plain import Plain

Bits = Literal["none", "8bit", "4bit"]


def options(
    bits: Bits,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Plain:
    """What ``from_pretrained`` needs; nothing for "none". Products are computed in ``dtype``, NF4
    is the 4-bit kind.

    Raises ``ModelError`` without a CUDA device or without the library.
    """
    if bits == "none":
        return {}
    if torch.device(device).type != "cuda":
        raise ModelError(
            f'model.quantize = "{bits}" needs a CUDA GPU, and the job runs on '
            f"{torch.device(device).type}; set it to "
            '"none", or run where there is one.'
        )
    missing = [package for package in ("bitsandbytes", "accelerate") if find_spec(package) is None]
    if missing:
        raise ModelError(
            f'model.quantize = "{bits}" needs {" and ".join(missing)}: pip install '
            f'"fedgrove[quantize]", or set it '
            'to "none".'
        )
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def foldable(name: str, linear: nn.Module) -> None:
    """Raises ``ModelError`` where a layer's weight is quantised, so that nothing can be added to
    it.
    """
    if not linear.weight.is_floating_point():  # type: ignore[operator]
        raise ModelError(
            f"'{name}' is held in few bits (model.quantize), so nothing can be folded into it; "
            f"choose the frozen side "
            'path, which gives the same (of Fed-PLoRA: method.folding = "side").'
        )
