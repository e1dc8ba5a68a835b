"""A reward model: how good an answer to a prompt is, learnt from pairs of answers (Bradley and Terry,
Biometrika 1952; Ouyang et al., NeurIPS 2022).

``r = vᵀ pool(x, y)`` and the loss ``−log σ(r⁺ − r⁻)``: the same number added to all rewards changes
nothing, so the head has no bias. Decoders pool the last token of the answer; encoders, whose
tokenizers begin texts with a [CLS], the mean over all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.readers import Row
from fedgrove.federation.tasks.base import Batch, Example, HeadedTask, Stock
from fedgrove.federation.tasks.generate import Template
from fedgrove.federation.tasks.pairs import (
    Pair,
    PairOptions,
    Pairs,
    both,
    cut,
    pair_in,
    verdict,
)
from fedgrove.federation.tasks.texts import INPUTS, padded, padded_inputs


class RewardOptions(PairOptions):
    """The keys of rewards."""


@dataclass(frozen=True)
class Reward(Pairs, HeadedTask[RewardOptions]):
    """``max_length`` tokens of prompt and answer together are read. A batch has two rows for each
    pair, the preferred answer's first.

    Shapes: b pairs.
    """

    name: ClassVar[str] = "reward"
    about: ClassVar[str] = "how good an answer is, from pairs of answers"
    Options: ClassVar[type[RewardOptions]] = RewardOptions
    # "regression": a pipeline gives the number as it is, instead of a sigmoid of it
    stock: ClassVar[Stock] = Stock(problem="regression")

    max_length: int = 128

    @property
    def outputs(self) -> int:
        """One number for each answer."""
        return 1

    @property
    def output_names(self) -> tuple[str, ...]:
        """As in Task."""
        return ("reward",)

    @property
    def tokens(self) -> dict[str, int]:
        """As in Task."""
        return {"max_length": self.max_length}

    # ---------------------------------------------------------------- examples
    def encode(self, rows: Sequence[Row], processor: Any) -> list[Example]:
        """Examples ``{"input_ids", "rejected_ids", "last"}``: prompt and answer of both, and whether
        the last token stands for all.
        """
        found: list[Example] = []
        for number, row in enumerate(rows, start=1):
            pair = pair_in(row, number)
            if encodes(processor):
                found.append(self._of_an_encoder(pair, processor))
            else:
                found.append(self._of_a_decoder(pair, processor, number))
        return self.differing(found)

    def _of_a_decoder(
        self,
        pair: Pair,
        tokenizer: Any,
        number: int,
    ) -> Example:
        template = Template(tokenizer)
        first, second = pair.turns()
        prompt, chosen = template.tokens(first, number)
        _, rejected = template.tokens(second, number)
        _, (better, worse) = cut(prompt, (chosen, rejected), self.max_length)
        return {"input_ids": better, "rejected_ids": worse, "last": True}

    def _of_an_encoder(self, pair: Pair, tokenizer: Any) -> Example:
        example: Example = {"last": False}
        asked = _in_one_text(pair)
        for answer, before in zip(pair.answers, ("", "rejected_"), strict=True):
            told = tokenizer(asked, answer, truncation=True, max_length=self.max_length)
            example[f"{before}ids" if before else "input_ids"] = list(told["input_ids"])
            if "token_type_ids" in told:
                example[f"{before}token_type_ids"] = list(told["token_type_ids"])
        return example

    def lengths(self, rows: Sequence[Row], processor: Any) -> list[int]:
        """Tokens of the longer answer and its prompt, before anything is cut."""
        found: list[int] = []
        for number, row in enumerate(rows, start=1):
            pair = pair_in(row, number)
            each = [_length(pair, answer, processor, number) for answer in (0, 1)]
            found.append(max(each))
        return found

    def truncated(self, rows: Sequence[Row], processor: Any) -> int:
        """As in Task."""
        return sum(length > self.max_length for length in self.lengths(rows, processor))

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """As in Task: ``last`` [2b] says whose last token stands for all."""
        batch = padded_inputs(both(examples, "input_ids"), pad_id)
        if all("token_type_ids" in each for each in examples):
            longest = batch["input_ids"].shape[1]
            batch["token_type_ids"] = padded(both(examples, "token_type_ids"), longest, 0)
        batch["last"] = torch.tensor([each["last"] for each in examples]).repeat_interleave(2)
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As in Task: each [2b, t]."""
        return {name: batch[name] for name in INPUTS if name in batch}

    # -------------------------------------------------------------------- head
    def new_head(self, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
        """weight [1, h] from N(0, 0.02²)."""
        return {"weight": torch.randn(1, hidden, generator=generator) * 0.02}

    def head_logits(
        self, states: Float[Tensor, "_ h"], head: Mapping[str, Tensor]
    ) -> Float[Tensor, "_ 1"]:
        """In the head's dtype."""
        return F.linear(states.to(head["weight"].dtype), head["weight"])

    def pool(self, hidden_states: Float[Tensor, "_ t h"], batch: Batch) -> Float[Tensor, "_ h"]:
        """The last token's state, or the mean over all, in at least float32."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        mask = batch["attention_mask"]
        lengths = mask.sum(1)
        place = torch.arange(mask.shape[1], device=mask.device)
        ends = place == (lengths - 1)[:, None]
        taken = torch.where(batch["last"][:, None], ends, mask.bool())
        weights = taken[..., None].to(dtype)
        return (hidden_states.to(dtype) * weights).sum(1) / weights.sum(1)

    # ---------------------------------------------------------------- measures
    def by_example(self, logits: Float[Tensor, "_ 1"], batch: Batch) -> Float[Tensor, "b 2"]:
        """The rewards of both answers."""
        return logits.view(-1, 2)

    def loss(self, logits: Float[Tensor, "_ 1"], batch: Batch) -> Float[Tensor, ""]:
        """As in Task: how unlikely the preferences are."""
        return self.loss_of(_margins(self.by_example(logits, batch))).mean()

    def score(self, logits: Float[Tensor, "_ 1"], batch: Batch) -> dict[str, float]:
        """Sums over pairs."""
        margins = _margins(self.by_example(logits, batch))
        return self.sums(margins, self.loss_of(margins))

    def told(self, logits: Float[Tensor, "b 2"]) -> list[Any]:
        """Which of two answers is better, and what both are worth."""
        found: list[Any] = []
        for rewards, margin in zip(logits.tolist(), _margins(logits).tolist(), strict=True):
            found.append(verdict(margin, {"rewards": rewards}))
        return found


def encodes(tokenizer: Any) -> bool:
    """Whether a tokenizer is an encoder's: its texts begin with a token that stands for them."""
    return getattr(tokenizer, "cls_token_id", None) is not None


def _margins(rewards: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
    return rewards[:, 0] - rewards[:, 1]


def _in_one_text(pair: Pair) -> str:
    """What was said before the answers."""
    return "\n".join(each["content"] for each in pair.asked)


def _length(
    pair: Pair,
    answer: int,
    tokenizer: Any,
    number: int,
) -> int:
    if encodes(tokenizer):
        told = tokenizer(_in_one_text(pair), pair.answers[answer], verbose=False)
        return len(told["input_ids"])
    return sum(map(len, Template(tokenizer).tokens(pair.turns()[answer], number)))
