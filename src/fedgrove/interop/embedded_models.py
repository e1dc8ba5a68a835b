"""The embedded models that packages carry in another format: written once into the cache as Hugging
Face folders.

Both are quantised where they come from, so they are close to the published weights, not equal to
them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from fedgrove.federation.assets import asset
from fedgrove.ground.errors import ModelError
from fedgrove.ground.files import whole_directory
from fedgrove.ground.plain import Plain
from fedgrove.interop.hub import fetched
from fedgrove.interop.onnx_weights import dequantised

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CARD = """---
license: apache-2.0
base_model: {upstream}
---
{upstream}, restored from {what} in the package {package}.

The weights were rounded for that file: expect what the original does, not its exact numbers. Made by Fedgrove, float16.
"""


@dataclass(frozen=True)
class Converted:
    """``write(files of the asset, new folder)`` makes the model folder; ``what`` names the format
    for the card.
    """

    upstream: str
    what: str
    write: Callable[[Path, Path], None]


def model_folder(name: str) -> Path:
    """The Hugging Face folder of an embedded model, fetched and converted on first use.

    Several processes may ask at once: one converts, the others wait. Raises ``DataError`` when the
    package cannot be had, ``ModelError`` when it cannot be converted.
    """
    source = asset(name)
    if name not in CONVERTED:
        return source
    folder = source.with_name(f"{source.name}-model")
    if not _complete(folder):
        from filelock import FileLock

        with FileLock(source.with_name(f"{folder.name}.lock")):
            if not _complete(folder):
                print(
                    f"restoring {name} from {CONVERTED[name].what}, once",
                    file=sys.stderr,
                    flush=True,
                )
                with whole_directory(folder) as partial:
                    CONVERTED[name].write(source, partial)
                    (partial / "README.md").write_text(_card(name), encoding="utf-8")
    return folder


def _complete(folder: Path) -> bool:
    # whole_directory renames it into place, so presence is enough
    return all(
        (folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")
    )


def _card(name: str) -> str:
    from fedgrove.federation.assets import ASSETS

    known = CONVERTED[name]
    return _CARD.format(upstream=known.upstream, what=known.what, package=ASSETS[name].package)


def minimind(source: Path, folder: Path) -> None:
    """int8 ONNX -> ``LlamaForCausalLM`` (8 layers of 512, grouped queries), its output layer tied
    to the embedding.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = dequantised(source / "model_quantized.onnx")
    _save(config, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).write_bytes((source / file).read_bytes())


def smollm2(source: Path, folder: Path) -> None:
    """Q4_1 GGUF -> ``LlamaForCausalLM``, read by transformers with the package gguf."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not _installed("gguf"):
        raise ModelError(
            "model.name: 'smollm2-135m' is read out of a GGUF file once, which needs the package "
            "gguf: "
            "pip install 'fedgrove[gguf]'."
        )
    with redirect_stderr(StringIO()):  # a bar for every tensor
        place = str(source)
        model = fetched(AutoModelForCausalLM, place, place, None, gguf_file=GGUF_FILE)
        tokenizer = fetched(AutoTokenizer, place, place, None, gguf_file=GGUF_FILE)
    config = {
        key: value for key, value in model.config.to_dict().items() if key != "quantization_config"
    }
    _save(config, model.state_dict(), folder)
    tokenizer.save_pretrained(str(folder))


def _save(
    config: Plain,
    weights: dict[str, Tensor],
    folder: Path,
) -> None:
    """A plain Llama in float16, as its authors kept it; ``weights``: a linear layer's [out, in],
    a norm's [hidden], the embedding's [vocabulary, hidden].
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    plain = LlamaConfig(**{**config, "dtype": torch.float16})
    with torch.device("meta"):
        model = LlamaForCausalLM(plain)
    if difference := set(model.state_dict()) ^ set(weights):
        raise ModelError(
            f"The packed weights do not fit their configuration (first difference: "
            f"{min(difference)})."
        )
    model.load_state_dict(
        {name: value.to(torch.float16) for name, value in weights.items()},
        assign=True,
    )
    model.tie_weights()
    ids = {name: getattr(plain, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(str(folder))


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


CONVERTED = {
    "minimind2-small": Converted("jingyaogong/MiniMind2-Small", "int8 ONNX", minimind),
    "smollm2-135m": Converted("HuggingFaceTB/SmolLM2-135M-Instruct", "4-bit GGUF", smollm2),
}
