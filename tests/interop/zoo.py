"""Tiny random checkpoints of many architectures, by their ``model_type``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.tiny import WORDS

#: sizes by whatever name a configuration has for them
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "ffn_dim": 64, "hidden_dim": 64, "ffn_hidden_size": 64, "n_inner": 64,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64,
    # large enough that attention matters: with the usual one a tiny model hardly sees other tokens
    "initializer_range": 0.2, "init_std": 0.2, "initializer_factor": 10.0,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip

ENCODERS = (
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta",
    "deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert", "fnet", "ibert",
    "layoutlm", "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet",
    "nomic_bert", "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roformer",
    "splinter", "squeezebert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "yoso",
)  # fmt: skip
DECODERS = (
    "apertus", "arcee", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2",
    "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2",
    "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss",
    "gptj", "granite", "granitemoe", "helium", "jetmoe", "llama", "mamba", "ministral",
    "mistral", "mixtral", "modernbert-decoder", "mpt", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "recurrent_gemma", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip
#: what knows no float64: its experts' products, its masks
SINGLE = (
    "longformer",
    "granitemoe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "xglm",
)
#: what has an encoder and a decoder
BOTH = ("bart", "marian", "mt5", "pegasus", "t5")
ALL = (*ENCODERS, *DECODERS, *BOTH)


def config_of(kind: str, **changes: Any) -> Any:
    """A tiny configuration."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    plain = made()
    left = WORKED_OUT.get(kind, ())
    own = {key: value for key, value in SIZES.items() if hasattr(plain, key) and key not in left}
    return made(**{**own, **SPECIAL.get(kind, {}), **changes})


T5 = {"num_decoder_layers": 2, "d_ff": 64, "d_kv": 8, "decoder_start_token_id": 0}
BART = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
#: what some need besides, or otherwise
SPECIAL: dict[str, dict[str, Any]] = {
    "t5": T5, "mt5": T5, "bart": BART, "marian": BART, "pegasus": BART,
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "longformer": {"attention_window": 4},
    "big_bird": {"attention_type": "original_full"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "deepseek_v2": {"q_lora_rank": None, "first_k_dense_replace": 1},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
}  # fmt: skip
#: sizes that a configuration works out itself
WORKED_OUT = {
    "falcon": ["head_dim", "ffn_hidden_size"],
    "xlnet": ["max_position_embeddings"],
}


def save(kind: str, folder: Path, *, writes: bool = False) -> Path:
    """A checkpoint with the word tokenizer of the tiny BERT; the same weights every time."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.bert.tokenization_bert import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), eos_token="[SEP]")
    tokenizer.save_pretrained(str(folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        factory: Any = AutoModel
        if writes:
            factory = AutoModelForSeq2SeqLM if kind in BOTH else AutoModelForCausalLM
        factory.from_config(config_of(kind)).save_pretrained(str(folder))
    return folder
