"""Extractive question answering: where in a text the answer to a question stands, by a linear head
on each token's last state, which gives one logit for a start and one for an end.

A long text is read in windows that share ``data.stride`` tokens. A window without the answer learns
the first token, as in Devlin et al., "BERT", arXiv 1810.04805, section 4.3; the answer to a question
is the likeliest span of all its windows. Measured are exact match and F1 of words, after SQuAD's
normalisation (``federation.answers``).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.answers import Answer, checked_answers, overlap
from fedgrove.federation.metrics.base import Answers
from fedgrove.federation.otherwise import SPANS
from fedgrove.federation.readers import Place, Row, text_of
from fedgrove.federation.tasks.base import Batch, Example, Stock
from fedgrove.federation.tasks.texts import LengthOptions, ReadsText
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import OF_THE_DATA, Column

LONGEST = 30  # tokens of an answer, as in BERT's own code
NOWHERE = 0  # the token that stands for no answer in a window
_OUTSIDE = (-1, -1)  # the characters of a token that is not of the text
_LOW = -1e30  # the logit of a token that cannot be chosen


class SpansOptions(LengthOptions):
    """The keys of questions about texts."""

    question: Column = Field("question", description="Column of the question.")
    context: Column = Field("context", description="Column of the text that answers it.")
    answers: Column = Field(
        "answers",
        description="Column of the answers, each of which is right and the first is learnt: a text "
        "that stands in the context, objects with text and start, SQuAD's { text, answer_start }, or "
        "the JSON of these.",
    )
    stride: int = Field(
        32, ge=0, description="Tokens that two windows of a text longer than max_length share."
    )
    unanswerable: Annotated[bool, OF_THE_DATA] = Field(
        False,
        description="Whether a question may have no answer: an empty one is learnt and given.",
    )


@dataclass(frozen=True)
class Asked:
    """A row's question: its windows share this one object."""

    context: str
    right: tuple[str, ...] | None  # None where the answers are not known


@dataclass(frozen=True)
class Found:
    """An answer in a text, in characters; empty where the question has none there."""

    start: int
    end: int
    score: float  # its probability

    def of(self, context: str) -> str:
        """Its text."""
        return context[self.start : self.end]

    def without_space(self, context: str) -> Found:
        """Without white space at its ends, which some tokenizers count to a word."""
        own = self.of(context)
        start = self.start + len(own) - len(own.lstrip())
        return Found(start, start + len(own.strip()), self.score)


@dataclass(frozen=True)
class Spans(ReadsText[Any]):
    """A row becomes an example for each window. Shapes: w windows."""

    name: ClassVar[str] = "spans"
    about: ClassVar[str] = "where a text answers a question"
    metric: ClassVar[str] = "answer_f1"
    gives: ClassVar[tuple[str, ...]] = ("outputs", "references")
    kind: ClassVar[str] = "spans"
    level: ClassVar[Literal["example", "token"]] = "token"
    asks: ClassVar[str] = "question"
    beside: ClassVar[tuple[str, ...]] = ("context",)
    learns: ClassVar[str] = "answers"
    windows: ClassVar[bool] = True
    suits: ClassVar[tuple[str, ...]] = (SPANS,)
    stock: ClassVar[Stock] = Stock("AutoModelForQuestionAnswering", "QUESTION_ANS")
    Options: ClassVar[type[SpansOptions]] = SpansOptions

    max_length: int = 128
    stride: int = 32
    unanswerable: bool = field(default=False)

    @property
    def outputs(self) -> int:
        """The logits of a start and of an end."""
        return 2

    def read(self, output: Any) -> Float[Tensor, "b t 2"]:
        """As in Task."""
        return torch.stack([output.start_logits, output.end_logits], dim=-1)

    # -------------------------------------------------------------------- rows
    @classmethod
    def columns(cls, data: SpansOptions) -> list[str]:
        """As in Task."""
        return [data.question, data.context, data.answers]

    @classmethod
    def row(
        cls,
        values: Mapping[str, Any],
        data: SpansOptions,
        place: Place,
    ) -> Row:
        """``{"question": str, "context": str, "answers": [[start, end], ...], "label": ""}``."""
        row = cls.question(values, data, place)
        given = values[data.answers]
        found = checked_answers(given, row["context"], data.answers, place)
        if not found and not data.unanswerable:
            raise DataError(
                f"{place} has no answer in the column {data.answers!r}; remove it, or set "
                "data.unanswerable = true if that means that the text does not answer the question"
            )
        return {**row, "answers": found, "label": ""}

    @classmethod
    def question(
        cls,
        values: Mapping[str, Any],
        data: SpansOptions,
        place: Place,
    ) -> Row:
        """As in Task."""
        return {
            "question": text_of(values[data.question], data.question, place),
            "context": text_of(values[data.context], data.context, place),
        }

    @classmethod
    def describe(cls, rows: Sequence[Row]) -> dict[str, Any]:
        """The median number of words of a text."""
        return {"median_words": median(len(row["context"].split()) for row in rows)}

    # ---------------------------------------------------------------- examples
    def encode(self, rows: Sequence[Row], processor: Any) -> list[Example]:
        """As in Task, the windows of a row one after the other: beside the input "offsets", the
        characters of each token of the text, "asked", and "label", the first and the last token of
        the answer.
        """
        if not getattr(processor, "is_fast", False):
            raise DataError(
                "the model's tokenizer does not say where its tokens stand in a text, which answers "
                "need; choose a model with a fast tokenizer"
            )
        examples: list[Example] = []
        for number, row in enumerate(rows, start=1):
            examples += self._windows(row, number, processor)
        return examples

    def _windows(
        self,
        row: Row,
        number: int,
        processor: Any,
    ) -> list[Example]:
        self._check_room(row["question"], number, processor)
        context = row["context"]
        answers = self._answers(row, number)
        right = None
        if answers is not None:
            right = tuple(context[start:end] for start, end in answers)
        asked = Asked(context, right)
        tokens = processor(
            row["question"],
            context,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        examples: list[Example] = []
        for window, ids in enumerate(tokens["input_ids"]):
            sides = tokens.sequence_ids(window)
            offsets = [
                tuple(place) if side == 1 else _OUTSIDE
                for place, side in zip(tokens["offset_mapping"][window], sides, strict=True)
            ]
            example: Example = {"input_ids": array("i", ids), "offsets": offsets, "asked": asked}
            if "token_type_ids" in tokens:
                example["token_type_ids"] = array("i", tokens["token_type_ids"][window])
            if answers is not None:
                example["label"] = _tokens_of(answers[:1], offsets)
            examples.append(example)
        if not any(_inside(place) for each in examples for place in each["offsets"]):
            raise DataError(
                f"row {number} has a text that the tokenizer turns into nothing; remove it"
            )
        return examples

    def _check_room(
        self,
        question: str,
        number: int,
        processor: Any,
    ) -> None:
        """Raise DataError where a question leaves windows no room to move on."""
        taken = len(processor(question, verbose=False)["input_ids"])
        room = self.max_length - taken - processor.num_special_tokens_to_add(pair=True)
        if room <= self.stride:
            raise DataError(
                f"row {number} has a question of {taken} tokens, which leaves no room for its text: "
                f"data.max_length = {self.max_length} must hold it, data.stride = {self.stride} and "
                "more; raise data.max_length, or shorten the question"
            )

    def _answers(self, row: Row, number: int) -> list[Answer] | None:
        """The checked answers; None where they are not known."""
        if self.learns not in row:
            return None
        given = row["answers"]
        if isinstance(given, list):
            given = [_spelt(each) for each in given]
        found = checked_answers(given, row["context"], "answers", f"row {number}")
        if not found and not self.unanswerable:
            raise DataError(f"row {number} has no answer; give one that stands in its context")
        return found

    def target(self, row: Row, number: int) -> Any:
        """Not asked: a row has a target for each of its windows."""
        raise NotImplementedError

    def targets(self, examples: Sequence[Example]) -> Int[Tensor, "b 2"]:
        """First and last token of the answer."""
        return torch.tensor([example["label"] for example in examples])

    def lengths(self, rows: Sequence[Row], processor: Any) -> list[int]:
        """As in Task: of question and text."""
        return [
            len(processor(row["question"], row["context"], verbose=False)["input_ids"])
            for row in rows
        ]

    def truncated(self, rows: Sequence[Row], processor: Any) -> int:
        """None: long texts have several windows."""
        return 0

    # ---------------------------------------------------------------- measures
    def loss(self, logits: Float[Tensor, "b t 2"], batch: Batch) -> Float[Tensor, ""]:
        """The mean cross-entropy of starts and ends over the windows."""
        return self._losses(logits, batch).mean()

    def _losses(self, logits: Float[Tensor, "b t 2"], batch: Batch) -> Float[Tensor, "b 2"]:
        """Padding cannot be chosen."""
        real = batch["attention_mask"].bool()[..., None]
        chosen = logits.masked_fill(~real, _LOW)
        return F.cross_entropy(chosen, batch["labels"], reduction="none")

    def score(self, logits: Float[Tensor, "b t 2"], batch: Batch) -> dict[str, float]:
        """Sums over windows; of answers see ``judged``."""
        losses = self._losses(logits, batch).mean(-1)
        return {"loss": float(losses.sum()), "windows": float(len(losses))}

    def judged(
        self, logits: Sequence[Float[Tensor, "_ 2"]], examples: Sequence[Example]
    ) -> dict[str, float]:
        """As in Task: sums over questions."""
        sums = {"exact_match": 0.0, "answer_f1": 0.0, "examples": 0.0}
        for asked, found in self._found(logits, examples):
            for key, value in overlap(found.of(asked.context), asked.right or ()).items():
                sums[key] += value
            sums["examples"] += 1
        return sums

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean loss of a window; mean F1 and exact match of a question."""
        count = sums["examples"]
        return {
            "loss": sums["loss"] / sums["windows"],
            "answer_f1": sums["answer_f1"] / count,
            "exact_match": sums["exact_match"] / count,
            "examples": count,
        }

    def compared(self, found: Float[Tensor, "n t 2"], examples: Sequence[Example]) -> Answers:
        """The answers' texts."""
        pairs = self._found(list(found), examples)
        return Answers(
            outputs=[answer.of(asked.context) for asked, answer in pairs],
            references=[asked.right or ("",) for asked, _ in pairs],
        )

    def told_of(
        self, logits: Float[Tensor, "n t 2"], examples: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """One answer for each question."""
        return [
            {
                "answer": found.of(asked.context),
                "start": found.start,
                "end": found.end,
                "score": round(found.score, 4),
            }
            for asked, found in self._found(list(logits), examples)
        ]

    # ----------------------------------------------------------------- answers
    def _found(
        self, logits: Sequence[Float[Tensor, "_ 2"]], examples: Sequence[Example]
    ) -> list[tuple[Asked, Found]]:
        """Each question, in order, with the likeliest span of its windows."""
        windows: dict[int, list[int]] = {}
        for number, example in enumerate(examples):
            windows.setdefault(id(example["asked"]), []).append(number)
        found: list[tuple[Asked, Found]] = []
        for numbers in windows.values():
            own = [examples[number] for number in numbers]
            best = self._best([logits[number] for number in numbers], own)
            asked: Asked = own[0]["asked"]
            found.append((asked, best.without_space(asked.context)))
        return found

    def _best(self, logits: Sequence[Float[Tensor, "_ 2"]], windows: Sequence[Example]) -> Found:
        """The span with the largest sum of its two logits; none where questions may have no answer and
        the least sum of the windows' first tokens is larger. Its score is the product of two softmaxes
        over all that could have been chosen in all windows.
        """
        places = [_choosable(each["offsets"]) for each in windows]
        pairs = zip(logits, places, strict=True)
        kept = [own[: len(inside)].double() for own, inside in pairs]
        total = self._total(kept, places)
        best: tuple[float, int, int, int] | None = None
        for number, (own, inside) in enumerate(zip(kept, places, strict=True)):
            value, start, end = _span(own, inside)
            if best is None or value > best[0]:
                best = (value, number, start, end)
        assert best is not None  # every row has a window
        value, number, start, end = best
        if self.unanswerable:
            nothing = min(float(own[NOWHERE].sum()) for own in kept)
            if nothing >= value:
                return Found(0, 0, _likely(nothing, total))
        offsets = windows[number]["offsets"]
        return Found(offsets[start][0], offsets[end][1], _likely(value, total))

    def _total(
        self, kept: Sequence[Float[Tensor, "_ 2"]], places: Sequence[Bool[Tensor, " _"]]
    ) -> float:
        """The logarithm of what probabilities are shares of: of logits [t, 2] by window, and whether
        each token can be chosen.
        """
        chosen = []
        for own, inside in zip(kept, places, strict=True):
            allowed = inside.clone()
            allowed[NOWHERE] |= self.unanswerable
            chosen.append(own[allowed])
        every = torch.cat(chosen)
        return float(every.logsumexp(0).sum())


def _spelt(answer: Any) -> Any:
    """A checked row's answer, [start, end], as what is checked."""
    if isinstance(answer, list | tuple):
        start, end = answer
        return {"start": start, "end": end}
    return answer


def _inside(place: tuple[int, int]) -> bool:
    """Whether a token has characters of the text."""
    start, end = place
    return start < end


def _choosable(offsets: Sequence[tuple[int, int]]) -> Bool[Tensor, " t"]:
    """[t] whether an answer may begin or end at each token."""
    return torch.tensor([_inside(place) for place in offsets])


def _tokens_of(answers: Sequence[Answer], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first and the last token of the answer; twice ``NOWHERE`` where there is none, or the window
    has not all of it.
    """
    for start, end in answers:
        own = [
            number
            for number, place in enumerate(offsets)
            if _inside(place) and place[0] < end and place[1] > start
        ]
        if own and offsets[own[0]][0] <= start and offsets[own[-1]][1] >= end:
            return own[0], own[-1]
    return NOWHERE, NOWHERE


def _span(logits: Float[Tensor, "t 2"], inside: Bool[Tensor, " t"]) -> tuple[float, int, int]:
    """The largest sum of a start's and an end's logit, and the two tokens, of those ``inside``; an
    answer has at most ``LONGEST`` tokens.
    """
    starts, ends = logits.masked_fill(~inside[:, None], _LOW).unbind(-1)
    sums = starts[:, None] + ends
    near = torch.ones_like(sums, dtype=torch.bool).triu().tril(LONGEST - 1)
    sums = sums.masked_fill(~near, 2 * _LOW)
    place = int(sums.argmax())
    start, end = divmod(place, len(inside))
    return float(sums[start, end]), start, end


def _likely(value: float, total: float) -> float:
    return float(torch.exp(torch.tensor(value - total, dtype=torch.float64)))
