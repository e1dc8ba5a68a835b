"""A language model under the kernel's hooks: logits where they matter, and greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Batch
    from fedgrove.interop.models import Base


class LanguageModel:
    """The base's own forward pass and ``generate``; what the kernel's hooks add is added in
    both.
    """

    def __init__(self, base: Base):
        self.base = base
        output = base.model.get_output_embeddings()
        self._asked: Tensor | None = None  # the positions of the forward pass in progress
        self._hook = output.register_forward_pre_hook(self._select)

    def close(self) -> None:
        """Take the hook off the base."""
        self._hook.remove()

    def logits(self, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
        """Logits [n, vocabulary] at the n true positions of ``positions`` [b, t], row by row.

        Only their hidden states reach the output layer: with a vocabulary of 49,000 the others
        would cost hundreds of megabytes. What a model does to its logits afterwards (scaling,
        capping) it does to each alone.
        """
        self._asked = positions
        try:
            logits: Tensor = self.base.model(**inputs).logits
        finally:
            self._asked = None
        return logits if logits.ndim == 2 else logits[positions]

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._asked is None or args[0].shape[:2] != self._asked.shape:
            return None
        return (args[0][self._asked], *args[1:])

    def generate(
        self, batch: Batch, *, most: int, ends: Sequence[int], cache: bool
    ) -> list[list[int]]:
        """Greedy continuations of prompts padded on the left, at most ``most`` tokens each, without
        their end.
        """
        from transformers import GenerationConfig

        pad = self.base.pad_id
        plain = GenerationConfig(
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=list(ends),
            pad_token_id=pad,
            use_cache=cache,
        )
        model, training = self.base.model, self.base.model.training
        model.eval()  # layers that are checkpointed in training mode would leave the cache empty
        with torch.inference_mode():
            whole = model.generate(**batch, generation_config=plain)
        model.train(training)
        found = []
        for row in whole[:, batch["input_ids"].shape[1] :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            found.append(row[:stop])
        return found


def padded_left(prompts: Sequence[Sequence[int]], pad: int) -> Batch:
    """``input_ids`` and ``attention_mask`` [b, t], so that every prompt ends where its continuation
    begins.
    """
    longest = max(map(len, prompts))
    ids = [[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
