"""Text generation as an encoder-decoder reads it: the prompt is the encoder's input, the completion
what the decoder learns to write, its end included.

Both are written as the tokenizer writes sources and targets; there is no template. Rows, measures
and keys are those of ``generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedgrove.federation.readers import Row
from fedgrove.federation.tasks.base import Batch, Example, Task
from fedgrove.federation.tasks.generate import IGNORED, Generate, messages_of
from fedgrove.federation.tasks.texts import padded, padded_inputs
from fedgrove.ground.errors import DataError, JobError

HEAD = "seq2seq"  # of ``training.readers.READERS``


def as_read(task: Task, head: str) -> Task:
    """The task as a model with this kind of head is read. Raises ``JobError`` for rows that an
    encoder-decoder has no place for.
    """
    if head != HEAD or not isinstance(task, Generate):
        return task
    if task.plain:
        raise JobError(
            "data.plain is for decoders: an encoder-decoder writes a completion to a prompt; name "
            "data.prompt and data.completion, or choose a decoder."
        )
    if task.answers == "every":
        raise JobError(
            'data.answers = "every" is for decoders: an encoder-decoder writes one completion of a '
            "row; leave it out, or choose a decoder."
        )
    return Seq2Seq(task.max_length, task.max_new_tokens, task.generate_examples)


@dataclass(frozen=True)
class Seq2Seq(Generate):
    """Shapes: b examples, t tokens of the longest prompt, u of the longest completion.

    Prompt and completion may each have ``max_length`` tokens; what is longer loses its end.
    """

    heads = (HEAD,)

    @property
    def tokens(self) -> dict[str, int]:
        """As in Task: of the longer side, for encoder and decoder have positions of their own."""
        if self.max_new_tokens > self.max_length:
            return {"max_new_tokens": self.max_new_tokens}
        return {"max_length": self.max_length}

    # ---------------------------------------------------------------- examples
    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Example]:
        """Examples ``{"input_ids", "prompt"}``, and ``"target_ids"`` and ``"references"`` where a row
        has a completion.

        Raises DataError for a conversation, and for a text that the tokenizer turns into nothing.
        """
        return [
            self._pair(row, tokenizer, number, self.max_length)
            for number, row in enumerate(rows, start=1)
        ]

    def _pair(
        self,
        row: Row,
        tokenizer: Any,
        number: int,
        most: int | None,
    ) -> Example:
        asked, *answers = messages_of(row)
        if asked["role"] != "user" or any(each["role"] != "assistant" for each in answers[:1]):
            raise _a_conversation(number)
        if len(answers) > 1:
            raise _a_conversation(number)
        options = {"truncation": most is not None, "max_length": most, "verbose": False}
        source = tokenizer(asked["content"], **options)["input_ids"]
        _check_some(source, tokenizer, f"row {number} has a prompt")
        example: Example = {"input_ids": source, "prompt": asked["content"]}
        for answer in answers:
            target = tokenizer(text_target=answer["content"], **options)["input_ids"]
            _check_some(target, tokenizer, f"row {number} has a completion")
            example["target_ids"] = target
            example["references"] = row.get("references") or [answer["content"]]
        return example

    def lengths(self, rows: Sequence[Row], tokenizer: Any) -> list[int]:
        """As in Task: of the longer of prompt and completion."""
        found: list[int] = []
        for number, row in enumerate(rows, start=1):
            example = self._pair(row, tokenizer, number, None)
            sides = (example["input_ids"], example.get("target_ids", []))
            found.append(max(map(len, sides)))
        return found

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """``input_ids``, ``attention_mask`` [b, t]; ``labels`` [b, u] where there are completions,
        ``IGNORED`` after their ends.
        """
        batch = self.prompts(examples, pad_id)
        if all("target_ids" in example for example in examples):
            targets = [example["target_ids"] for example in examples]
            batch["labels"] = padded(targets, max(map(len, targets)), IGNORED)
        return batch

    def prompts(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """As in WritingTask, [b, t], but padded on the right: the decoder begins afresh."""
        return padded_inputs([example["input_ids"] for example in examples], pad_id)

    def ends(self, tokenizer: Any) -> list[int]:
        """As in WritingTask."""
        return [tokenizer.eos_token_id]

    def positions(self, batch: Batch) -> Bool[Tensor, "b u"]:
        """True in the decoder's places that are followed by a token of the completion; without one
        [b, 1], for the first token.
        """
        if "labels" in batch:
            return batch["labels"] != IGNORED
        first = batch["input_ids"][:, :1]
        return torch.ones_like(first, dtype=torch.bool)

    def pool(self, hidden_states: Float[Tensor, "b t h"], batch: Batch) -> Float[Tensor, "b h"]:
        """The mean of the encoder's states over the prompt's tokens."""
        prompts = {"attention_mask": batch["attention_mask"]}
        return super().pool(hidden_states, prompts)

    def _asked(self, batch: Batch) -> Int[Tensor, " n"]:
        labels = batch["labels"]
        return labels[labels != IGNORED]


def _check_some(
    ids: Sequence[int],
    tokenizer: Any,
    what: str,
) -> None:
    """Raise DataError where a text has no tokens but the special ones that the tokenizer adds."""
    if set(ids) <= set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}:
        raise DataError(f"{what} that the tokenizer turns into nothing; remove it")


def _a_conversation(number: int) -> DataError:
    return DataError(
        f"row {number} is a conversation, and an encoder-decoder reads one prompt; give a prompt and a "
        "completion instead, or choose a decoder"
    )
