"""Planted fields: what each kind of client has to learn is known layer by layer.

The base is a small random language model. A *teacher* is the base with rank-2 changes planted in
query and value of every layer: one change for all clients in the shallow layers, one for each of
two branches in the middle, one for each group in the deep ones. A client's rows are random prompts
with the answers that its teacher drew, token by token. So the tree over layers, the groups and the
loss that nothing can undercut (the teacher's own) are known exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgrove.ground.seeds import derive, generator

SPECIAL = ["<pad>", "<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} <|end|>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@dataclass(frozen=True)
class Planted:
    """``counts``: nodes in each layer, shallow to deep, each a divisor of the next."""

    counts: tuple[int, ...] = (1, 2, 4)
    members: int = 4  # clients in each of the deepest groups
    rows: int = 60  # for each client, training and test together
    hidden: int = 32
    #: norm of a planted change over that of the weight, in the first layer and in the last
    strength: tuple[float, float] = (1.0, 4.0)
    rank: int = 2
    prompt: int = 2  # words
    answer: int = 3
    words: int = 16  # that there are
    sharp: float = 3.0  # of the output layer: how sure a teacher is of its answers

    @property
    def groups(self) -> int:
        return self.counts[-1]

    def node(self, layer: int, group: int) -> int:
        """The node of ``layer`` that ``group`` belongs to."""
        return group * self.counts[layer] // self.groups

    def norm(self, layer: int) -> float:
        """The relative norm of a change in ``layer``: geometric from the first to the last."""
        first, last = self.strength
        depth = max(1, len(self.counts) - 1)
        return float(first * (last / first) ** (layer / depth))

    def clients(self) -> dict[str, int]:
        """The group of each client, by name."""
        return {
            f"group{group}-{member}": group
            for group in range(self.groups)
            for member in range(self.members)
        }

    def labels(self, layer: int, names: Sequence[str]) -> list[int]:
        """The true node of each client in a layer."""
        known = self.clients()
        return [self.node(layer, known[name]) for name in names]


def make(planted: Planted, folder: Path, seed: int) -> None:
    """``folder/model`` (a Hugging Face folder) and ``folder/silos`` (a JSON Lines file a client)."""
    model, tokenizer = _base(planted)
    model.save_pretrained(str(folder / "model"))
    tokenizer.save_pretrained(str(folder / "model"))
    silos = folder / "silos"
    silos.mkdir(parents=True, exist_ok=True)
    floors = {}
    for group in range(planted.groups):
        teacher = _teacher(planted, group, seed)
        for name, own in planted.clients().items():
            if own != group:
                continue
            rows, floors[name] = _answered(planted, teacher, tokenizer, seed, name)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (silos / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "floor.json").write_text(json.dumps(floors), encoding="utf-8")


def _base(planted: Planted) -> tuple[Any, Any]:
    """The random language model, the same for every seed of the study, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = [*SPECIAL, *(f"w{number}" for number in range(planted.words))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=planted.hidden,
        num_hidden_layers=len(planted.counts),
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * planted.hidden,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= planted.sharp
    return model.eval(), tokenizer


def _teacher(planted: Planted, group: int, seed: int) -> Any:
    """The base with the changes planted that this group has."""
    teacher, _ = _base(planted)
    for layer, block in enumerate(teacher.model.layers):
        node = planted.node(layer, group)
        for name in ("q_proj", "v_proj"):
            weight = getattr(block.self_attn, name).weight
            rng = generator(seed, "planted", layer, node, name)
            change = _change(weight, planted.rank, planted.norm(layer), rng)
            with torch.no_grad():
                weight += change
    return teacher


def _change(weight: Tensor, rank: int, norm: float, rng: torch.Generator) -> Tensor:
    """A random change of the weight [out, in], of this rank and relative norm."""
    rows, columns = weight.shape
    left = torch.randn(rows, rank, generator=rng)
    right = torch.randn(rank, columns, generator=rng)
    change = left @ right
    return change * (norm * weight.detach().norm() / change.norm())


@torch.inference_mode()
def _answered(
    planted: Planted, teacher: Any, tokenizer: Any, seed: int, name: str
) -> tuple[list[dict[str, str]], float]:
    """Rows with the teacher's answers, and its loss a token on them: what nothing can undercut."""
    rng = generator(seed, "planted", name)
    first = len(SPECIAL)
    asked = torch.randint(
        first, first + planted.words, (planted.rows, planted.prompt), generator=rng
    )
    prompts = [" ".join(tokenizer.convert_ids_to_tokens(row)) for row in asked.tolist()]
    ids = torch.tensor(
        [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
            for prompt in prompts
        ]
    )
    losses = []
    for _ in range(planted.answer):
        logits = teacher(ids).logits[:, -1, first:].double()
        shares = logits.softmax(-1)
        chosen = torch.multinomial(shares, 1, generator=rng)
        losses.append(-shares.gather(1, chosen).log())
        ids = torch.cat([ids, chosen + first], dim=1)
    answers = ids[:, -planted.answer :].tolist()
    rows = [
        {"prompt": prompt, "completion": " ".join(tokenizer.convert_ids_to_tokens(answer))}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return rows, torch.cat(losses).mean().item()


def fingerprint(planted: Planted) -> int:
    """Changes with whatever a planted field is made of."""
    return derive(0, planted, CHAT)
