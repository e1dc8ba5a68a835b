"""A tiny BERT with a word tokenizer and a tiny federation, made on the spot: what most tests run
on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgrove.job.sections import TrainSection

GOOD = ["good", "fine", "happy", "great", "bright"]
BAD = ["bad", "poor", "sad", "awful", "dark"]
FILLER = ["the", "a", "day", "film", "was", "and", "very", "it", "felt", "book"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]


def save_bert(folder: Path, *, layers: int = 2, hidden: int = 32) -> Path:
    """A random BERT of 2 × 32 with its tokenizer; the same weights every time."""
    from transformers import BertConfig, BertModel
    from transformers.models.bert.tokenization_bert import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(str(folder))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(str(folder))
    return folder


def sentences(count: int, seed: int, skew: float = 0.5) -> list[dict[str, Any]]:
    """Rows of text and label that a tiny model can learn."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        positive = draw.random() < skew
        words = [draw.choice(FILLER) for _ in range(draw.randint(3, 7))]
        for _ in range(2):
            words.insert(draw.randrange(len(words)), draw.choice(GOOD if positive else BAD))
        rows.append({"text": " ".join(words), "label": "positive" if positive else "negative"})
    return rows


def save_silos(folder: Path, clients: int = 3, rows: int = 24) -> Path:
    """One jsonl file per client, labels skewed from client to client."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(clients):
        skew = 0.3 + 0.4 * index / max(1, clients - 1)
        lines = [json.dumps(row) for row in sentences(rows + 4 * index, seed=index, skew=skew)]
        (folder / f"site-{index}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tiny_job(bert: Path, folder: Path, /, **changes: dict[str, Any]) -> Any:
    """A job on the tiny model: three rounds of three steps in float32 on one thread."""
    from fedgrove.job import Job

    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(bert)},
        "lora": {"rank": 4},
        "data": {"source": "silos", "path": str(folder), "max_length": 32},
        "train": {
            "lr": 5e-3,
            "batch_size": 4,
            "local_steps": 3,
            "dtype": "float32",
            "threads": 1,
            "device": "cpu",
        },
        "run": {"rounds": 3, "seed": 7},
    }
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    return Job.build(values)


def save_vit(folder: Path, *, layers: int = 2, hidden: int = 32, side: int = 16) -> Path:
    """A random ViT of 2 × 32 for images of 16 × 16 with its image processor; the same weights every
    time.
    """
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    config = ViTConfig(
        image_size=side,
        patch_size=4,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(str(folder))
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(str(folder))
    return folder


def picture(label: str, draw: random.Random, side: int = 20) -> Any:
    """A noisy picture that a tiny model can tell by its label: "red" or "blue"."""
    from PIL import Image

    image = Image.new("RGB", (side, side))
    strong, weak = (
        [draw.randrange(150, 256) for _ in range(side * side)],
        [draw.randrange(90) for _ in range(side**2)],
    )
    red, blue = (strong, weak) if label == "red" else (weak, strong)
    image.putdata([(r, draw.randrange(200), b) for r, b in zip(red, blue, strict=True)])
    return image


def save_pictures(folder: Path, clients: int = 3, images: int = 24) -> Path:
    """``site-0/red/0.png`` and so on, labels skewed from client to client."""
    draw = random.Random(0)
    for index in range(clients):
        for number in range(images):
            label = "red" if number < images * (index + 1) / (clients + 1) else "blue"
            place = folder / f"site-{index}" / label
            place.mkdir(parents=True, exist_ok=True)
            picture(label, draw).save(place / f"{number}.png")
    return folder


CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% "
    "endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
LLAMA_WORDS = [
    "<pad>", "<unk>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "###", "Instruction", "Response",
    ":", "what", "is", "not", *GOOD, *BAD, *FILLER,
]  # fmt: skip


def save_llama(
    folder: Path, *, layers: int = 2, hidden: int = 32, chat: bool = True, tied: bool = True
) -> Path:
    """A random Llama of 2 × 32 (grouped queries) with a word tokenizer; the same weights every
    time.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(LLAMA_WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=len(LLAMA_WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # large enough that its greedy texts differ from prompt to prompt
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def exchanges(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of prompt and completion: "what is not good" is answered with good's opposite, between
    fillers.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        number = draw.randrange(len(GOOD))
        words = [draw.choice(FILLER) for _ in range(draw.randint(0, 5))]
        rows.append(
            {
                "prompt": " ".join([*words, "what is not", GOOD[number]]),
                "completion": f"it was {BAD[number]}",
            }
        )
    return rows


def save_exchanges(folder: Path, clients: int = 3, rows: int = 24) -> Path:
    """One jsonl file of exchanges per client."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(clients):
        lines = [json.dumps(row) for row in exchanges(rows + 4 * index, seed=index)]
        (folder / f"site-{index}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@contextmanager
def without_reports() -> Iterator[None]:
    """Runs inside draw no report: it has its own tests, and drawing is what takes the time."""

    def blank(run_dir: Path, *_: Any, **__: Any) -> Path:
        (run_dir / "report.html").write_text("left out in this test\n", encoding="utf-8")
        return run_dir / "report.html"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrove.runs.finish.write_report", blank)
        yield


def unclipped(**changes: Any) -> TrainSection:
    """A ``[train]`` section that clips no gradient unless told to."""
    return TrainSection(**{"clip": 0.0, **changes})


PAIR_WORDS = ["<pad>", "</s>", "<s>", "<unk>", "what", "is", "not", *GOOD, *BAD, *FILLER]
_T5 = {"d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
_BART = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
#: sizes of the tiny encoder-decoders, by model_type
PAIR_SIZES: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
    "pegasus": _BART,
    "marian": _BART,
}


def save_pairs(folder: Path, kind: str) -> Path:
    """A random encoder-decoder of 2 + 2 layers of 32 with a word tokenizer that ends every text; the
    same weights every time.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    numbers = {word: number for number, word in enumerate(PAIR_WORDS)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begun = "<s> $A </s>" if kind == "bart" else "$A </s>"
    ends = [(word, numbers[word]) for word in ("<s>", "</s>")]
    words.post_processor = processors.TemplateProcessing(single=begun, special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token="<s>",
    )
    tokenizer.save_pretrained(str(folder))
    kinds: Any = CONFIG_MAPPING
    config = kinds[kind](
        vocab_size=len(PAIR_WORDS),
        d_model=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        decoder_start_token_id=1 if kind == "bart" else 0,
        **PAIR_SIZES[kind],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(str(folder))
    return folder
