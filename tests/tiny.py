"""A tiny BERT with a word tokenizer and a tiny federation, made on the spot: what most tests run on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

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
        "train": {"lr": 5e-3, "batch_size": 4, "local_steps": 3, "dtype": "float32", "threads": 1, "device": "cpu"},
        "run": {"rounds": 3, "seed": 7},
    }
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    return Job.build(values)
