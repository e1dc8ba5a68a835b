"""Text generation: a prompt, or a conversation, and the completion that the model learns to write.

The model reads prompt and completion through the chat template of its tokenizer; where the
tokenizer has none, as
``### Instruction:\\n<prompt>\\n\\n### Response:\\n<completion>`` and its end-of-sequence token. The
loss is that of the completion's tokens alone, the end included; of a conversation, that of its last
answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.metrics.base import Answers
from fedgrove.federation.metrics.overlap import Overlap
from fedgrove.federation.readers import Place, Row, text_of
from fedgrove.federation.tasks.base import SAID_WHERE_SET, Batch, Example, WritingTask
from fedgrove.federation.tasks.conversation import answers, conversation
from fedgrove.federation.tasks.template import columns_in, filled
from fedgrove.federation.tasks.texts import LengthOptions
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import COLUMN, OF_THE_DATA, Column, Text
from fedgrove.ground.toml import shown

IGNORED = -100  # the label of a position that is not learnt, as everywhere in PyTorch


class GenerateOptions(LengthOptions):
    """The keys of generation."""

    prompt: Column = Field("prompt", description="Column of the prompt.")
    completion: Column = Field(
        "completion",
        description="Column of the text to learn; a list of texts: the first is learnt, each is "
        "right.",
    )
    messages: Annotated[Text | None, COLUMN, OF_THE_DATA] = Field(
        None,
        description="Column of a conversation, a list of { role, content } that ends with the "
        "assistant, instead of prompt and completion.",
        examples=["messages"],
    )
    answers: Annotated[Literal["last", "every"], OF_THE_DATA] = Field(
        "last",
        description="Of conversations: whether the last answer is learnt, or every one.",
    )
    template: Annotated[Text | None, OF_THE_DATA] = Field(
        None,
        description="The prompt as a text with columns in braces, instead of data.prompt; a "
        "paragraph whose columns are all empty is left out.",
        examples=["{instruction}\n\n{input}"],
    )
    plain: Annotated[Text | None, COLUMN, OF_THE_DATA] = Field(
        None,
        description="Column of a plain text that the model learns to go on with, instead of prompt "
        "and completion.",
        examples=["text"],
    )
    max_new_tokens: int = Field(48, ge=1, description="The most tokens that the model writes.")
    generate_examples: int = Field(
        16,
        ge=1,
        description="How many test rows of a client are generated for ROUGE and exact match.",
    )

    @field_validator("template")
    @classmethod
    def _names_columns(cls, template: str | None) -> str | None:
        if template is not None:
            columns_in(template)
        return template

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.way == "pairs" and self.template is None and self.prompt == self.completion:
            raise ValueError(
                f"data.prompt and data.completion are both {shown(self.prompt)}, so a model would "
                "learn to repeat; name two columns."
            )
        for chosen, useless in USELESS.items():
            if getattr(self, chosen) is None:
                continue
            for key in useless:
                _refuse_beside(self, key, chosen)
        if self.answers == "every" and self.messages is None:
            raise ValueError(
                'data.answers = "every" has no use without data.messages, whose answers it means; '
                "leave it out."
            )
        return self

    @property
    def way(self) -> Literal["pairs", "conversations", "texts"]:
        """What rows are."""
        if self.plain is not None:
            return "texts"
        if self.messages is not None:
            return "conversations"
        return "pairs"


#: a key that says what rows are -> the keys that then say nothing
USELESS = {
    "messages": ("prompt", "completion", "template", "plain"),
    "plain": ("prompt", "completion", "template"),
    "template": ("prompt",),
}


def _refuse_beside(
    data: GenerateOptions,
    key: str,
    chosen: str,
) -> None:
    value = getattr(data, key)
    if value != GenerateOptions.model_fields[key].default:
        raise ValueError(
            f"data.{key} = {shown(value)} has no use with data.{chosen} = "
            f"{shown(getattr(data, chosen))}; leave it out."
        )


@dataclass(frozen=True)
class Generate(WritingTask[GenerateOptions]):
    """``max_length`` tokens of prompt and completion together are read, ``max_new_tokens`` are
    written at most.

    A longer row loses the start of its prompt, down to half of ``max_length``; a completion that
    still does not fit loses its end, and with it the end-of-sequence token.
    """

    name: ClassVar[str] = "generate"
    about: ClassVar[str] = "to write a completion"
    metric: ClassVar[str] = "rouge_l"
    gives: ClassVar[tuple[str, ...]] = ("outputs", "references")
    Options: ClassVar[type[GenerateOptions]] = GenerateOptions
    asks: ClassVar[str] = "prompt"
    learns: ClassVar[str] = "completion"

    max_length: int = 256
    max_new_tokens: int = 48
    generate_examples: int = 16
    answers: str = field(default="last", metadata=SAID_WHERE_SET)
    plain: bool = field(default=False, metadata=SAID_WHERE_SET)

    @classmethod
    def of(cls, data: GenerateOptions) -> Generate:
        """As in Task."""
        return cls(
            data.max_length,
            data.max_new_tokens,
            data.generate_examples,
            data.answers,
            data.plain is not None,
        )

    @property
    def tokens(self) -> dict[str, int]:
        """As in Task."""
        return {"max_length": self.max_length, "max_new_tokens": self.max_new_tokens}

    # -------------------------------------------------------------------- rows
    @classmethod
    def columns(cls, data: GenerateOptions) -> list[str]:
        """As in Task."""
        if data.plain is not None:
            return [data.plain]
        if data.messages is not None:
            return [data.messages]
        asked = [data.prompt]
        if data.template is not None:
            asked = columns_in(data.template)
        return [*asked, data.completion]

    @classmethod
    def row(
        cls,
        values: Mapping[str, Any],
        data: GenerateOptions,
        place: Place,
    ) -> Row:
        """``{"prompt": str, "completion": str}``, ``{"messages": [{"role", "content"}, ...]}`` or
        ``{"plain": str}``, and ``"label": ""``.

        A completion that is a list of texts gives ``"references"`` too: the first is learnt, each
        counts as right.
        """
        if data.plain is not None:
            plain = text_of(values[data.plain], data.plain, place)
            return {"plain": plain, "label": ""}
        if data.messages is not None:
            said = conversation(values[data.messages], data.messages, place)
            return {"messages": said, "label": ""}
        right = answers(values[data.completion], data.completion, place)
        if data.template is None:
            prompt = text_of(values[data.prompt], data.prompt, place)
        else:
            prompt = filled(data.template, values, place)
        row: Row = {"prompt": prompt, "completion": right[0], "label": ""}
        if len(right) > 1:
            row["references"] = right
        return row

    @classmethod
    def describe(cls, rows: Sequence[Row]) -> dict[str, Any]:
        """The median number of words of prompt and completion together."""
        return {"median_words": median(map(_words, rows))}

    # ---------------------------------------------------------------- examples
    def encode(self, rows: Sequence[Row], tokenizer: Any) -> list[Example]:
        """Examples ``{"input_ids", "spans", "prompt_ids", "prompt", "references"}``.

        What is learnt are the tokens in ``spans``, [start, end) each; ``prompt_ids`` is what a
        generation starts from; ``prompt`` and ``references`` are texts. A row without a completion
        gives the prompt's half alone. Raises DataError for a conversation where the tokenizer has
        no chat template, and for a completion that the tokenizer turns into nothing.
        """
        template = Template(tokenizer)
        return [self._example(row, template, number) for number, row in enumerate(rows, start=1)]

    def _example(
        self,
        row: Row,
        template: Template,
        number: int,
    ) -> Example:
        if self.plain or "plain" in row:
            return self._going_on(row, template, number)
        messages = messages_of(row)
        prompt, completion = template.tokens(row, number)
        asked = messages[-1]
        if completion:
            asked = messages[-2]
        example: Example = {"prompt": asked["content"]}
        example["prompt_ids"] = prompt[-self.max_length :]
        if not completion:
            return example | {"input_ids": example["prompt_ids"]}
        example["references"] = row.get("references") or [messages[-1]["content"]]
        if self.answers == "every":
            return example | self._every_answer(messages, template, number)
        room = self.max_length - len(completion)
        kept = min(len(prompt), max(room, self.max_length // 2))
        whole = prompt[-kept:] + completion
        ids = whole[: self.max_length]
        example["input_ids"] = ids
        example["spans"] = [(kept, len(ids))]
        return example

    def _every_answer(
        self,
        messages: list[dict[str, str]],
        template: Template,
        number: int,
    ) -> Example:
        """All of a conversation's answers; what is too long loses its end."""
        ids, spans = template.turns(messages, number)
        kept: list[tuple[int, int]] = []
        for start, end in spans:
            end = min(end, self.max_length)
            if start < end:
                kept.append((start, end))
        if not kept:
            raise DataError(
                f"row {number} has its first answer after data.max_length = {self.max_length} "
                "tokens, so nothing of it would be learnt; raise it or shorten the row"
            )
        return {"input_ids": ids[: self.max_length], "spans": kept}

    def _going_on(
        self,
        row: Row,
        template: Template,
        number: int,
    ) -> Example:
        """A plain text, all of which is learnt; its second half is what a generation should write.
        A prompt is one without an end.
        """
        if "plain" not in row:
            ids = template.plain(row["prompt"], number)
            ids = ids[-self.max_length :]
            return {"prompt": row["prompt"], "prompt_ids": ids, "input_ids": ids}
        tokenizer = template.tokenizer
        whole = template.plain(row["plain"], number)
        ids = [*whole, tokenizer.eos_token_id][: self.max_length]
        half = max(1, len(ids) // 2)
        ends = set(tokenizer.all_special_ids)
        rest = [token for token in ids[half:] if token not in ends]
        prompt = tokenizer.decode(ids[:half], skip_special_tokens=True)
        going_on = tokenizer.decode(rest).strip()
        return {
            "input_ids": ids,
            "spans": [(1, len(ids))],
            "prompt_ids": ids[:half],
            "prompt": prompt,
            "references": [going_on or row["plain"]],
        }

    def lengths(self, rows: Sequence[Row], tokenizer: Any) -> list[int]:
        """Tokens of each row before anything is cut."""
        template = Template(tokenizer)
        return [self._length(row, template, number) for number, row in enumerate(rows, start=1)]

    def _length(
        self,
        row: Row,
        template: Template,
        number: int,
    ) -> int:
        if "plain" in row:
            return len(template.plain(row["plain"], number)) + 1
        return sum(map(len, template.tokens(row, number)))

    def truncated(self, rows: Sequence[Row], tokenizer: Any) -> int:
        """As in Task."""
        return sum(length > self.max_length for length in self.lengths(rows, tokenizer))

    def length(self, example: Example) -> int:
        """As in Task."""
        return len(example["input_ids"])

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """``input_ids``, ``attention_mask`` [b, t], padded on the right; ``labels`` [b, t] where
        there are completions.

        A label is the token that stands there, ``IGNORED`` outside the completion.
        """
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        longest = int(lengths.max())
        place = torch.arange(longest)
        ids: list[list[int]] = []
        for example in examples:
            own = example["input_ids"]
            padding = [pad_id] * (longest - len(own))
            ids.append([*own, *padding])
        batch = {
            "input_ids": torch.tensor(ids),
            "attention_mask": (place < lengths[:, None]).long(),
        }
        if all("spans" in example for example in examples):
            learnt = torch.zeros(len(examples), longest, dtype=torch.bool)
            for row, example in zip(learnt, examples, strict=True):
                for start, end in example["spans"]:
                    row[start:end] = True
            batch["labels"] = torch.where(learnt, batch["input_ids"], IGNORED)
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """As in Task: tokens and mask, [b, t] each."""
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def prompts(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """As in WritingTask: every prompt ends where its continuation begins."""
        prompts = [example["prompt_ids"] for example in examples]
        longest = max(map(len, prompts))
        ids: list[list[int]] = []
        mask: list[list[int]] = []
        for prompt in prompts:
            before = longest - len(prompt)
            ids.append([pad_id] * before + list(prompt))
            mask.append([0] * before + [1] * len(prompt))
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
        }

    def ends(self, tokenizer: Any) -> list[int]:
        """As in WritingTask."""
        return Template(tokenizer).ends()

    def positions(self, batch: Batch) -> Bool[Tensor, "b t"]:
        """As in WritingTask, [b, t]: before each token of a completion, or at a prompt's end."""
        if "labels" in batch:
            following = batch["labels"][:, 1:] != IGNORED
            return F.pad(following, (0, 1))
        mask = batch["attention_mask"]
        place = torch.arange(mask.shape[1], device=mask.device)
        last = mask.sum(1, keepdim=True) - 1
        return place == last

    # -------------------------------------------------------------------- head
    def pool(self, hidden_states: Float[Tensor, "b t h"], batch: Batch) -> Float[Tensor, "b h"]:
        """The mean over the prompt's tokens, so that it is the same in training and when the
        completion is unknown.
        """
        mask = batch["attention_mask"].bool()
        if "labels" in batch:
            mask = mask & (batch["labels"] == IGNORED)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weights = mask[..., None].to(dtype)
        total = (hidden_states.to(dtype) * weights).sum(1)
        return total / weights.sum(1).clamp(min=1)

    # ---------------------------------------------------------------- measures
    def loss(self, logits: Float[Tensor, "n vocabulary"], batch: Batch) -> Float[Tensor, ""]:
        """The mean over the batch's completion tokens; logits [n, vocabulary] at ``positions``."""
        return F.cross_entropy(_wide(logits), self._asked(batch))

    def score(self, logits: Float[Tensor, "n vocabulary"], batch: Batch) -> dict[str, float]:
        """Sums over completion tokens; of generations see ``judge``."""
        asked = self._asked(batch)
        loss = F.cross_entropy(_wide(logits), asked, reduction="sum")
        return {
            "loss": float(loss),
            "tokens": float(len(asked)),
            "examples": float(len(batch["labels"])),
        }

    def chosen(self, examples: Sequence[Example]) -> list[int]:
        """Which examples get a generation: ``generate_examples``, spread evenly."""
        count = min(self.generate_examples, len(examples))
        return [index * len(examples) // count for index in range(count)]

    def judge(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Sums of what generations share with the best of their references."""
        overlap = Overlap()
        sums = dict.fromkeys(("rouge_1", "rouge_l", "exact_match"), 0.0)
        for output, example in zip(outputs, examples, strict=True):
            shared = overlap(output, example["references"])
            for key, value in shared.items():
                sums[key] += value
        return sums | {"generated": float(len(outputs))}

    def shown(self, outputs: Sequence[str], examples: Sequence[Example]) -> list[dict[str, str]]:
        """As in WritingTask: prompt, reference and output."""
        found: list[dict[str, str]] = []
        for output, example in zip(outputs, examples, strict=True):
            line = {
                "prompt": example["prompt"],
                "reference": example["references"][0],
                "output": output,
            }
            found.append(line)
        return found

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss per completion token (nats), ROUGE-L and ROUGE-1 (F1) and exact match of
        generations, perplexity.
        """
        loss = sums["loss"] / sums["tokens"]
        generated = sums.get("generated", 0.0)
        found = {"loss": loss}
        if generated:
            for key in ("rouge_l", "rouge_1", "exact_match"):
                found[key] = sums[key] / generated
        perplexity = math.inf
        if loss < 700:
            perplexity = math.exp(loss)
        return found | {"perplexity": perplexity, "examples": sums["examples"]}

    def compared(self, found: Sequence[str], examples: Sequence[Example]) -> Answers:
        """The written texts beside their references."""
        references = [each["references"] for each in examples]
        return Answers(outputs=list(found), references=references)

    def _asked(self, batch: Batch) -> Int[Tensor, " n"]:
        """The tokens that the logits are about, in their order."""
        following = batch["labels"][:, 1:]
        return following[following != IGNORED]


class Template:
    """How a tokenizer writes conversations as tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.chat = bool(getattr(tokenizer, "chat_template", None))

    def tokens(self, row: Row, number: int = 1) -> tuple[list[int], list[int]]:
        """(prompt, completion with its end) of a row; no completion where the row has none."""
        messages = messages_of(row)
        answered = messages[-1]["role"] == "assistant"
        before = messages
        whole: list[dict[str, str]] | None = None
        if answered:
            before, whole = messages[:-1], messages
        if self.chat:
            return self._by_chat(before, whole, number)
        if len(before) > 1 or before[-1]["role"] != "user":
            raise DataError(
                f"row {number} is a conversation, but the model's tokenizer has no chat template; "
                f"give a prompt and a "
                "completion instead, or choose a model that is made for conversations"
            )
        prompt = self.tokenizer(
            f"### Instruction:\n{before[-1]['content']}\n\n### Response:\n",
            verbose=False,
        )
        ids = list(prompt["input_ids"])
        while ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
        if not answered:
            return ids, []
        return ids, self._closed(messages[-1]["content"], number)

    def _by_chat(
        self,
        before: list[dict[str, str]],
        whole: list[dict[str, str]] | None,
        number: int,
    ) -> tuple[list[int], list[int]]:
        tokenizer = self.tokenizer
        try:
            start = tokenizer.apply_chat_template(
                before,
                tokenize=False,
                add_generation_prompt=True,
            )
            text = ""
            if whole:
                text = tokenizer.apply_chat_template(whole, tokenize=False)
        except Exception as error:
            # a template refuses in its own words: no system message, roles must alternate
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"row {number} does not fit the model's chat template: {reason[:200]}"
            ) from error
        prompt = tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]
        if not whole:
            return list(prompt), []
        if not text.startswith(start):  # templates that rewrite what comes before an answer
            return list(prompt), self._closed(whole[-1]["content"], number)
        answer = text[len(start) :].rstrip()
        return list(prompt), self._closed(answer, number)

    def _closed(self, text: str, number: int) -> list[int]:
        """The completion's tokens with an end: the template's own closing token, or the
        end-of-sequence token.
        """
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if ids and ids[-1] in self.tokenizer.all_special_ids:
            end = ids.pop()
        else:
            end = self.tokenizer.eos_token_id
        if not ids:
            raise DataError(
                f"row {number} has a completion that the tokenizer turns into nothing; remove it"
            )
        return [*ids, end]

    def turns(
        self, messages: list[dict[str, str]], number: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """A whole conversation's tokens, and where its answers with their ends stand in them.

        Each answer is what the template writes after what it writes up to there. Raises DataError
        where a template rewrites what comes before an answer, so that no place can be found.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            row = {"messages": messages[: place + 1]}
            before, answer = self.tokens(row, number)
            if before[: len(ids)] != ids:
                raise DataError(
                    f"row {number} has several answers, but the model's chat template rewrites "
                    'earlier ones as a conversation goes on; set data.answers = "last"'
                )
            ids = before + answer
            spans.append((len(before), len(ids)))
        return ids, spans

    def plain(self, text: str, number: int) -> list[int]:
        """A text's tokens as the model begins texts, without an end. Raises DataError for none."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        while ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
        if len(ids) < 2:
            raise DataError(
                f"row {number} has a text of fewer than two tokens, so there is nothing to go on "
                "with; remove it"
            )
        return ids

    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        row = {"prompt": "a", "completion": "a"}
        return sorted({self.tokens(row)[1][-1], self.tokenizer.eos_token_id})


def messages_of(row: Row) -> list[dict[str, str]]:
    """The row as a conversation; its last message is the completion, where there is one."""
    if "plain" in row:
        return [{"role": "user", "content": row["plain"]}]
    if "messages" in row:
        return list(row["messages"])
    if not isinstance(row["prompt"], str):  # what a trained model is asked may be a conversation
        return list(row["prompt"])
    prompt = [{"role": "user", "content": row["prompt"]}]
    return (
        [*prompt, {"role": "assistant", "content": row["completion"]}]
        if "completion" in row
        else prompt
    )


def _words(row: Row) -> int:
    return sum(len(message["content"].split()) for message in messages_of(row))


def _wide(logits: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n vocabulary"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
