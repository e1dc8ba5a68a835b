"""A language model's own passes: logits where they matter, and greedy generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from fedgrove.interop.models import Base


class LanguageModel:
    """The base's own forward pass and ``generate``; what hooks on its sites add is added in both."""

    def __init__(self, base: Base):
        self.base = base
        output = base.model.get_output_embeddings()
        self._asked: Tensor | None = None  # the positions of the forward pass in progress
        self._hook = output.register_forward_pre_hook(self._select)

    def close(self) -> None:
        """Take the hook off the base."""
        self._hook.remove()

    def logits(
        self,
        inputs: Mapping[str, object],
        positions: Bool[Tensor, "b t"],
    ) -> Float[Tensor, "n vocabulary"]:
        """Logits at the n true positions, row by row.

        Only their hidden states reach the output layer: with a vocabulary of 49,000 the others
        would cost hundreds of megabytes. What a model does to its logits afterwards (scaling,
        capping) it does to each alone.
        """
        self._asked = positions
        try:
            logits: Tensor = self.base.model(**inputs).logits
        finally:
            self._asked = None
        if logits.ndim == 3:  # a model that computes its own logits for every token
            return logits[positions]
        return logits

    def _select(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """States [b, t, h] of all tokens -> [n, h] of those that are asked for; None: as they are."""
        states = args[0]
        if self._asked is None or states.shape[:2] != self._asked.shape:
            return None
        return (states[self._asked], *args[1:])

    def generate(
        self,
        prompts: Mapping[str, Shaped[Tensor, "b t"]],
        *,
        most: int,
        ends: Sequence[int],
        cache: bool,
    ) -> list[list[int]]:
        """Greedy continuations of prompts [b, t] padded on the left, at most ``most`` tokens each,
        without their end.
        """
        from transformers import GenerationConfig

        plain = GenerationConfig(
            decoder_start_token_id=self.base.model.generation_config.decoder_start_token_id,
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=list(ends),
            pad_token_id=self.base.pad_id,
            use_cache=cache,
        )
        model = self.base.model
        training = model.training
        model.eval()  # layers that are checkpointed in training mode would leave the cache empty
        with torch.inference_mode():
            whole = model.generate(**prompts, generation_config=plain)
        model.train(training)
        written = self.after(prompts, whole).tolist()
        return [_before_the_end(row, ends) for row in written]

    def after(
        self,
        prompts: Mapping[str, Shaped[Tensor, "b t"]],
        whole: Int[Tensor, "b all"],
    ) -> Int[Tensor, "b new"]:
        """What of a generation was written, and not given."""
        _, length = prompts["input_ids"].shape
        return whole[:, length:]


class EncoderDecoder(LanguageModel):
    """A model whose encoder reads the prompt and whose decoder writes from a token of its own."""

    @property
    def start(self) -> int:
        """The token that every text starts from."""
        return int(self.base.model.generation_config.decoder_start_token_id)

    def before(
        self,
        labels: Int[Tensor, "b u"] | None,
        positions: Bool[Tensor, "b u"],
    ) -> Int[Tensor, "b u"]:
        """What the decoder reads where it is asked at these positions: the start, and the labels but
        for the last one.
        """
        read = torch.full_like(positions, self.base.pad_id, dtype=torch.long)
        read[:, 0] = self.start
        if labels is not None:
            earlier = labels[:, :-1]
            read[:, 1:] = earlier.masked_fill(earlier < 0, self.base.pad_id)
        return read

    def after(
        self,
        prompts: Mapping[str, Shaped[Tensor, "b t"]],
        whole: Int[Tensor, "b all"],
    ) -> Int[Tensor, "b new"]:
        """As in LanguageModel: all but the start."""
        return whole[:, 1:]


def _before_the_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens
