"""What a task is to the trainer: examples, batches, a head on pooled states, a loss and a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fedgrove.federation.readers import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, Any]  # "input_ids": list[int]; "label": int, absent where a row has no label
Batch = dict[str, Tensor]


class Task(Protocol):
    """Shapes: b examples, t tokens of the longest in the batch, h hidden size, c outputs of the head."""

    @property
    def name(self) -> str:
        """As ``summary.json`` names the task."""

    @property
    def metric(self) -> str:
        """The key of ``measure`` that says how good a model is; higher is better."""

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Token ids with special tokens, cut to the maximum length, and the label's number."""

    def truncated(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> int:
        """How many rows ``encode`` cuts."""

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """input_ids and attention_mask [b, t] and, where the examples have labels, labels [b]; all int64."""

    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A fresh head's tensors in float32, by name."""

    def pool(self, hidden_states: Tensor, batch: Batch) -> Tensor:
        """[b, t, h] -> [b, h]."""

    def head_logits(self, pooled: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """[b, h] -> [b, c], in the head's dtype."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The batch's mean loss, a scalar."""

    def score(self, logits: Tensor, batch: Batch) -> dict[str, float]:
        """Sums over the batch, to be added up over batches and given to ``measure``."""

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means out of sums: "loss", the task's metric, and "examples"."""
