"""A language model's adapter as a GGUF file, for llama.cpp (``--lora FILE``).

The format (llama.cpp, ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``): metadata
``general.type = "adapter"``, ``general.architecture`` that of the base, ``adapter.type = "lora"`` and
one ``adapter.lora.alpha``; for each layer ``NAME.weight.lora_a`` ``[rank, in]`` and
``NAME.weight.lora_b`` ``[out, rank]``, whose update is ``alpha / rank * B @ A``. Where the base's own
weights are reordered for llama.cpp's rotary positions, so are the rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.federation.tasks import TASKS
from fedgrove.ground.errors import RunError
from fedgrove.interop import peft
from fedgrove.interop.models import load_config

SUFFIX = ".gguf"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a kind of model, and whether it reorders queries and keys."""

    name: str
    reordered: bool


#: by transformers' class; others are refused, because what llama.cpp does to their weights differs
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", True),
    "MistralForCausalLM": Architecture("llama", True),
    "Qwen2ForCausalLM": Architecture("qwen2", False),
    "Qwen3ForCausalLM": Architecture("qwen3", False),
}


def write_gguf(source: Path, out: Path) -> None:
    """Write the adapter directory ``source`` as the file ``out``, in float32.

    Raises ``RunError``, in one sentence, for what a GGUF adapter cannot say: heads, encoders, mixes
    that depend on the input, other architectures.
    """
    card = peft.read_json(source / peft.CARD)
    if "why" in card:
        raise RunError(f"{source.name} cannot be a GGUF adapter: {card['why']}")
    if not TASKS.find(card["task"]).writes:
        raise RunError(
            f"{source.name} is a classifier, and a GGUF adapter has no head; --to gguf is for "
            'language models (data.task = "generate").'
        )
    adapter, _, _ = peft.read_adapter(source)
    config = load_config(card["model"], card.get("revision"))
    architecture = _architecture(source, config)
    alpha, scaled = _one_alpha(adapter)
    tensors: dict[str, Tensor] = {}
    for site, factors in scaled.items():
        name = _name(source, site, architecture, config)
        b = factors.B.float()
        if architecture.reordered:
            b = _reordered(b, site, config)
        tensors[f"{name}.weight.lora_a"] = factors.A.float().contiguous()
        tensors[f"{name}.weight.lora_b"] = b.contiguous()
    _write(out, architecture, alpha, tensors)


def _architecture(source: Path, config: Any) -> Architecture:
    kinds = [str(kind) for kind in getattr(config, "architectures", None) or ["no known model"]]
    if kinds[0] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise RunError(
            f"{source.name} is an adapter of {kinds[0]}; --to gguf knows {known}: merge it "
            "(--merge), and convert the whole model with llama.cpp's own script."
        )
    return ARCHITECTURES[kinds[0]]


def _name(
    source: Path,
    site: str,
    architecture: Architecture,
    config: Any,
) -> str:
    """llama.cpp's name of a layer."""
    import gguf

    kind = gguf.MODEL_ARCH[architecture.name.upper()]
    name = gguf.get_tensor_name_map(kind, config.num_hidden_layers).get_name(site)
    if name == "output" and config.tie_word_embeddings:
        name = None  # llama.cpp has one tensor for both, and no adapter of it
    if name is None:
        raise RunError(
            f"{source.name} adapts '{site}', for which llama.cpp's {architecture.name} takes no "
            "adapter; merge it (--merge)."
        )
    return str(name)


def _one_alpha(adapter: Mapping[str, Factors]) -> tuple[float, Adapter]:
    """One alpha for all, and the factors with what differs from it folded into B."""
    alphas = {factors.scale * factors.rank for factors in adapter.values()}
    alpha = max(alphas)
    if len(alphas) == 1 and alpha > 0:  # a zero would mean that none is given
        return alpha, dict(adapter)
    alpha = float(max(factors.rank for factors in adapter.values()))
    folded = {
        site: Factors(each.A, each.B * (each.scale * each.rank / alpha), alpha / each.rank)
        for site, each in adapter.items()
    }
    return alpha, folded


def _reordered(
    b: Float[Tensor, "out rank"],
    site: str,
    config: Any,
) -> Float[Tensor, "out rank"]:
    """The rows of queries and keys as llama.cpp's rotary positions want them: a head's first and
    second half interleaved.
    """
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(site.rpartition(".")[2])
    if heads is None:
        return b
    return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _write(
    out: Path,
    architecture: Architecture,
    alpha: float,
    tensors: Mapping[str, Tensor],
) -> None:
    """``tensors``: ``lora_a`` [rank, in] and ``lora_b`` [out, rank] of each layer."""
    import gguf

    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, value.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)
