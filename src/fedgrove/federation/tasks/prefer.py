"""Preferences between two answers, learnt by a language model: federated DPO (Rafailov et al., "Direct
Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023; label
smoothing as in Mitchell's note on conservative DPO, 2023).

Of a prompt x and two answers, ``h = β [log(π/π_ref)(y⁺|x) − log(π/π_ref)(y⁻|x)]``, log-probabilities
summed over an answer's tokens and its end; the loss is ``−(1−ε) log σ(h) − ε log σ(−h)``. ``π_ref`` is
the base, with the adapter that the run starts from, in all rounds and whatever the clients have
learnt: its two numbers are computed once for each pair and kept with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.readers import Row
from fedgrove.federation.tasks.base import Batch, Example, WritingTask
from fedgrove.federation.tasks.generate import IGNORED, Generate, Template
from fedgrove.federation.tasks.pairs import (
    PairOptions,
    Pairs,
    both,
    cut,
    pair_in,
    verdict,
)
from fedgrove.federation.tasks.texts import padded_inputs


class PreferOptions(PairOptions):
    """The keys of preferences."""

    beta: float = Field(
        0.1,
        gt=0,
        description="How much of a change of the log-probability counts (β of DPO): the larger, the "
        "sooner a pair is learnt and the nearer the model stays to the base.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="The share ε of pairs that are taken to be the wrong way round.",
    )
    max_new_tokens: int = Field(
        48, ge=1, description="The most tokens that the finished model writes after a prompt."
    )


@dataclass(frozen=True)
class Prefer(Pairs, WritingTask[PreferOptions]):
    """``max_length`` tokens of prompt and answer together are read. A batch has two rows for each
    pair, the preferred answer's first; its logits are those of the answers' tokens.

    Shapes: b pairs, n tokens of all their answers.
    """

    name: ClassVar[str] = "prefer"
    about: ClassVar[str] = "which of two answers to prefer"
    Options: ClassVar[type[PreferOptions]] = PreferOptions

    max_length: int = 128
    beta: float = 0.1
    label_smoothing: float = 0.0
    max_new_tokens: int = 48

    @property
    def tokens(self) -> dict[str, int]:
        """As in Task."""
        return {"max_length": self.max_length, "max_new_tokens": self.max_new_tokens}

    @property
    def policy(self) -> Generate:
        """How the model reads and writes one text."""
        return Generate(self.max_length, self.max_new_tokens)

    # ---------------------------------------------------------------- examples
    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Example]:
        """Examples ``{"input_ids", "rejected_ids", "start"}``: prompt and answer of both, and where
        the answers begin. A row that is a prompt alone is one to write after, as of ``Generate``.
        """
        template = Template(tokenizer)
        if not self.written(rows):
            found = [self._example(row, template, at) for at, row in enumerate(rows, start=1)]
            return self.differing(found)
        return self.policy.encode(rows, tokenizer)

    def _example(
        self,
        row: Row,
        template: Template,
        number: int,
    ) -> Example:
        first, second = pair_in(row, number).turns()
        prompt, chosen = template.tokens(first, number)
        _, rejected = template.tokens(second, number)
        kept, (better, worse) = cut(prompt, (chosen, rejected), self.max_length)
        return {"input_ids": better, "rejected_ids": worse, "start": kept}

    def lengths(self, rows: Sequence[Row], tokenizer: Any) -> list[int]:
        """Tokens of the longer answer and its prompt, before anything is cut."""
        template = Template(tokenizer)
        found: list[int] = []
        for number, row in enumerate(rows, start=1):
            turns = pair_in(row, number).turns()
            found.append(max(sum(map(len, template.tokens(each, number))) for each in turns))
        return found

    def truncated(self, rows: Sequence[Row], tokenizer: Any) -> int:
        """As in Task."""
        return sum(length > self.max_length for length in self.lengths(rows, tokenizer))

    def prime(
        self,
        base: Callable[[Sequence[Example]], Float[Tensor, "n 2"]],
        examples: Sequence[Example],
    ) -> None:
        """Note each pair's ``"reference"``, log π_ref of both answers [2]."""
        new = [each for each in examples if "rejected_ids" in each and "reference" not in each]
        if not new:
            return
        for example, numbers in zip(new, base(new), strict=True):
            example["reference"] = numbers.clone()

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """As in Task: ``labels`` [2b, t], the answers' tokens where they stand, and where it is
        known the ``reference`` of each row [2b].
        """
        if not all("rejected_ids" in each for each in examples):
            return self.policy.collate(examples, pad_id)
        batch = padded_inputs(both(examples, "input_ids"), pad_id)
        starts = torch.tensor([each["start"] for each in examples]).repeat_interleave(2)
        place = torch.arange(batch["input_ids"].shape[1])
        learnt = (place >= starts[:, None]) & batch["attention_mask"].bool()
        batch["labels"] = torch.where(learnt, batch["input_ids"], IGNORED)
        if all("reference" in each for each in examples):
            batch["reference"] = torch.stack([each["reference"] for each in examples]).flatten()
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As in Task: tokens and mask, [2b, t] each."""
        return self.policy.inputs(batch)

    def positions(self, batch: Batch) -> Bool[Tensor, "_ t"]:
        """As in WritingTask, [2b, t]: before each token of an answer."""
        return self.policy.positions(batch)

    def pool(self, hidden_states: Float[Tensor, "_ t h"], batch: Batch) -> Float[Tensor, "_ h"]:
        """The mean over the prompt's tokens, which both rows of a pair have."""
        return self.policy.pool(hidden_states, batch)

    # ---------------------------------------------------------------- measures
    def by_example(
        self, logits: Float[Tensor, "n vocabulary"], batch: Batch
    ) -> Float[Tensor, "b _"]:
        """log π/π_ref of both answers [b, 2]; log π itself where no reference is noted; of prompts
        alone the logits.
        """
        if "labels" not in batch:
            return logits
        marks = batch["labels"][:, 1:] != IGNORED
        asked = batch["labels"][:, 1:][marks]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = -F.cross_entropy(wide, asked, reduction="none")
        counts: list[int] = marks.sum(1).tolist()
        whole = torch.stack([part.sum() for part in each.split(counts)])
        if "reference" in batch:
            whole = whole - batch["reference"].to(whole.dtype)
        return whole.unflatten(0, (-1, 2))

    def margins(self, ratios: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
        """h of each pair."""
        return self.beta * (ratios[:, 0] - ratios[:, 1])

    def loss(self, logits: Float[Tensor, "n vocabulary"], batch: Batch) -> Float[Tensor, ""]:
        """As in Task: that of DPO."""
        margins = self.margins(self.by_example(logits, batch))
        return self.loss_of(margins, self.label_smoothing).mean()

    def score(self, logits: Float[Tensor, "n vocabulary"], batch: Batch) -> dict[str, float]:
        """Sums over pairs, of the preferred answer's log π/π_ref too."""
        ratios = self.by_example(logits, batch)
        margins = self.margins(ratios)
        sums = self.sums(margins, self.loss_of(margins, self.label_smoothing))
        return {**sums, "chosen_log_ratio": float(ratios[:, 0].sum())}

    def told(self, logits: Float[Tensor, "b 2"]) -> list[Any]:
        """Which of two answers the model prefers to the other, more than the base does."""
        found: list[Any] = []
        for (first, second), margin in zip(
            logits.tolist(), self.margins(logits).tolist(), strict=True
        ):
            found.append(verdict(margin, {"log_ratios": [first, second]}))
        return found

    # ----------------------------------------------------------------- writing
    def written(self, rows: Sequence[Row]) -> bool:
        """Rows that are prompts alone are written after; two answers are compared."""
        return not any("chosen" in row or "rejected" in row for row in rows)

    def chosen(self, examples: Sequence[Example]) -> list[int]:
        """As in WritingTask: none, an evaluation compares."""
        return []

    def prompts(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """As in WritingTask."""
        return self.policy.prompts(examples, pad_id)

    def ends(self, processor: Any) -> list[int]:
        """As in WritingTask."""
        return self.policy.ends(processor)

    def judge(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """As in WritingTask: nothing was written."""
        return {}

    def shown(self, outputs: Sequence[str], examples: Sequence[Example]) -> list[dict[str, str]]:
        """As in WritingTask: nothing was written."""
        return []
