"""What tasks share whose rows are two answers to one prompt, of which one is preferred.

Public sets write such rows in several ways, all of which are read: answers as texts, as lists of
messages that hold the answer alone or begin with the prompt (UltraFeedback), and whole
conversations without a prompt's column, as lists or as texts of ``Human:`` and ``Assistant:`` turns
(HH-RLHF).
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, ClassVar, Self

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation.otherwise import PREFERENCES
from fedgrove.federation.readers import Place, Row, text_of
from fedgrove.federation.tasks.base import Example
from fedgrove.federation.tasks.conversation import conversation
from fedgrove.federation.tasks.texts import LengthOptions
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import OF_THE_DATA, Column, Text, distinct
from fedgrove.ground.toml import shown

Messages = list[dict[str, str]]

BOTH = ("chosen", "rejected")
_ASKED = {"role": "user", "content": "?"}  # what an answer alone still lacks
_ANSWERED = {"role": "assistant", "content": "?"}  # what a prompt alone still lacks
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class PairOptions(LengthOptions):
    """The keys of rows that are two answers."""

    prompt: Column = Field(
        "prompt",
        description="Column of the prompt: a text, or a list of { role, content }.",
    )
    chosen: Column = Field(
        "chosen",
        description="Column of the answer that is preferred: a text, or a list of { role, content } "
        "that ends with it.",
    )
    rejected: Column = Field("rejected", description="Column of the other answer, alike.")
    whole: Annotated[bool, OF_THE_DATA] = Field(
        False,
        description="Whether both answers are whole conversations, as lists of { role, content } or "
        "as texts of Human: and Assistant: turns; data.prompt is not read then.",
    )
    ratings: Annotated[tuple[Text, ...] | None, Field(strict=False), OF_THE_DATA] = Field(
        None,
        description="Columns of what the two answers were rated, the preferred one's first: ties "
        "are refused, and rows that contradict their ratings.",
        examples=[["score_chosen", "score_rejected"]],
    )

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        distinct("data.chosen and data.rejected", (self.chosen, self.rejected))
        if self.ratings is not None and len(set(self.ratings)) != 2:
            raise ValueError(
                f"data.ratings = {shown(self.ratings)}: name two columns, the preferred answer's "
                "rating and the other's."
            )
        return self


@dataclass(frozen=True)
class Pair:
    """A prompt, which ends with the user, and two answers to it, the preferred one first."""

    asked: Messages
    answers: tuple[str, str]

    def row(self) -> Row:
        """``{"prompt": a text or messages, "chosen": str, "rejected": str, "label": ""}``."""
        prompt: str | Messages = self.asked
        if len(self.asked) == 1:
            prompt = self.asked[0]["content"]
        chosen, rejected = self.answers
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": ""}

    def turns(self) -> list[Row]:
        """The two conversations, as rows of generation."""
        found: list[Row] = []
        for answer in self.answers:
            said = {"role": "assistant", "content": answer}
            found.append({"messages": [*self.asked, said]})
        return found


class Pairs:
    """The part of a Task that reads such rows and tells which answer is preferred."""

    learns: ClassVar[str] = "chosen"
    asks: ClassVar[str] = "prompt"
    beside: ClassVar[tuple[str, ...]] = BOTH
    suits: ClassVar[tuple[str, ...]] = (PREFERENCES,)
    metric: ClassVar[str] = "accuracy"
    rows_each: ClassVar[int] = 2
    max_length: int

    # -------------------------------------------------------------------- rows
    @classmethod
    def columns(cls, data: PairOptions) -> list[str]:
        """As in Task."""
        asked = [] if data.whole else [data.prompt]
        return [*asked, data.chosen, data.rejected, *(data.ratings or ())]

    @classmethod
    def answer_columns(cls, data: PairOptions) -> list[str]:
        """As in Task: which answer is preferred needs no column; ratings would tell."""
        return list(data.ratings or ())

    @classmethod
    def row(
        cls,
        values: Mapping[str, Any],
        data: PairOptions,
        place: Place,
    ) -> Row:
        """As ``Pair.row``. Raises DataError for two answers that are the same, or rated the same."""
        if data.ratings is not None:
            _check_ratings(values, data.ratings, place)
        return cls.question(values, data, place)

    @classmethod
    def question(
        cls,
        values: Mapping[str, Any],
        data: PairOptions,
        place: Place,
    ) -> Row:
        """As in Task: the first of the two answers is data.chosen's."""
        return pair_of(values, data, place).row()

    @classmethod
    def describe(cls, rows: Sequence[Row]) -> dict[str, Any]:
        """The median number of words of an answer."""
        words = [len(row[answer].split()) for row in rows for answer in BOTH]
        return {"median_words": median(words)}

    # ---------------------------------------------------------------- examples
    def length(self, example: Example) -> int:
        """The longer answer's tokens, its prompt's included."""
        return max(len(example["input_ids"]), len(example.get("rejected_ids", ())))

    def differing(self, examples: Sequence[Example]) -> list[Example]:
        """The examples. Raises DataError for those whose answers are alike once they are cut."""
        alike: list[int] = []
        for number, example in enumerate(examples, start=1):
            if "rejected_ids" in example and example["input_ids"] == example["rejected_ids"]:
                alike.append(number)
        if alike:
            raise DataError(
                f"{_rows(alike)} two answers that are alike in what the model reads of them "
                f"(data.max_length = {self.max_length} tokens); raise it, or remove what is alike"
            )
        return list(examples)

    # ---------------------------------------------------------------- measures
    def loss_of(self, margins: Float[Tensor, " b"], smoothing: float = 0.0) -> Float[Tensor, " b"]:
        """``−(1−ε) log σ(h) − ε log σ(−h)`` of each margin h."""
        right = F.logsigmoid(margins)
        wrong = F.logsigmoid(-margins)
        return -(1 - smoothing) * right - smoothing * wrong

    def sums(self, margins: Float[Tensor, " b"], losses: Float[Tensor, " b"]) -> dict[str, float]:
        """Sums over pairs; a margin of zero, where nothing is preferred, is half right."""
        right = (margins > 0).double() + 0.5 * (margins == 0).double()
        return {
            "loss": float(losses.sum()),
            "right": float(right.sum()),
            "margin": float(margins.sum()),
            "examples": float(len(margins)),
        }

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over pairs: loss, how often the preferred answer has the larger value, by how much,
        and what else was summed up.
        """
        count = sums["examples"]
        found = {"loss": sums["loss"] / count, "accuracy": sums["right"] / count}
        for key, value in sums.items():
            if key not in ("loss", "right", "examples"):
                found[key] = value / count
        return found | {"examples": count}


def preferred(margin: float) -> str:
    """Which of two answers a margin is for."""
    if margin == 0:
        return "neither"
    if margin > 0:
        return "first"
    return "second"


def verdict(margin: float, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a user is told of two answers: which is preferred, how likely, and ``values``."""
    likely = 1 / (1 + math.exp(-max(-700.0, min(700.0, margin))))
    return {
        "preferred": preferred(margin),
        "margin": margin,
        "probability_first": likely,
        **values,
    }


def both(examples: Sequence[Example], key: str) -> list[Any]:
    """What each example holds of its two answers, ``key`` of the preferred one's, row after row."""
    found: list[Any] = []
    for example in examples:
        found.append(example[key])
        found.append(example[f"rejected_{key.removeprefix('input_')}"])
    return found


def cut(
    prompt: Sequence[int],
    answers: tuple[Sequence[int], Sequence[int]],
    max_length: int,
) -> tuple[int, list[array[int]]]:
    """(how many tokens of the prompt stay, prompt and answer of both): where they are too long both
    lose the same start of their prompt, down to half of ``max_length``, then an answer its end.
    """
    room = max_length - max(map(len, answers))
    kept = min(len(prompt), max(room, max_length // 2))
    rest = list(prompt[len(prompt) - kept :])
    return kept, [array("i", [*rest, *answer][:max_length]) for answer in answers]


# ---------------------------------------------------------------------------- what rows hold
def pair_of(
    values: Mapping[str, Any],
    data: PairOptions,
    place: Place,
) -> Pair:
    """The pair in a row's columns. Raises DataError where it is none."""
    said = [_said(values[name], name, place, data.whole) for name in (data.chosen, data.rejected)]
    (before, chosen), (other, rejected) = said
    if data.whole:
        if before != other:
            raise DataError(
                f"{place}: {data.chosen!r} and {data.rejected!r} differ before their last answers, "
                "so they answer different prompts; remove the row"
            )
        asked = before
    else:
        asked = _prompt(values[data.prompt], data.prompt, place)
        for own, name in ((before, data.chosen), (other, data.rejected)):
            if own and not _same(own, asked):
                raise DataError(
                    f"{place}: the conversation in {name!r} begins with another prompt than that in "
                    f"{data.prompt!r}; set data.whole = true to go by the conversations, or correct "
                    "the row"
                )
        asked = max(asked, before, other, key=len)  # with the system's message, where one has it
    if chosen.strip() == rejected.strip():
        raise DataError(
            f"{place}: {data.chosen!r} and {data.rejected!r} are the same answer; remove the row"
        )
    return Pair(asked, (chosen, rejected))


def pair_in(row: Mapping[str, Any], number: int) -> Pair:
    """As ``pair_of``, of a row with the keys that ``Pair.row`` gives."""
    place = f"row {number}"
    for key in ("prompt", *BOTH):
        if key not in row:
            raise DataError(f"{place} has no {key!r}; give a prompt and two answers to it")
    return pair_of(row, PairOptions(), place)


def _said(
    value: Any,
    column: str,
    place: Place,
    whole: bool,
) -> tuple[Messages, str]:
    """What stands before an answer, and the answer."""
    messages = _messages(value)
    if messages is None and not whole:
        return [], text_of(value, column, place)
    if messages is None:
        messages = _turns(text_of(value, column, place), column, place)
    if len(messages) == 1 and not whole:
        return [], conversation([_ASKED, *messages], column, place)[-1]["content"]
    said = conversation(messages, column, place)
    return said[:-1], said[-1]["content"]


def _prompt(value: Any, column: str, place: Place) -> Messages:
    messages = _messages(value)
    if messages is None:
        return [{"role": "user", "content": text_of(value, column, place)}]
    return conversation([*messages, _ANSWERED], column, place)[:-1]


def _messages(value: Any) -> list[Any] | None:
    """A column's list of messages, or the JSON of one; None where it is a text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list | tuple):
        return None
    said = [isinstance(each, Mapping) and bool({"role", "from"} & each.keys()) for each in value]
    return list(value) if said and all(said) else None


def _turns(
    text: str,
    column: str,
    place: Place,
) -> list[Any]:
    """The turns of a text. Raises DataError where it has none."""
    before, *pieces = _TURN.split(text)
    if before.strip() or not pieces:
        raise DataError(
            f"{place}: the column {column!r} is no conversation: neither a list of messages nor a "
            "text that begins with Human:"
        )
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": role.lower(), "content": content.strip()} for role, content in turns]


def _same(own: Messages, asked: Messages) -> bool:
    """Whether two prompts are one, but for white space and a system's message."""

    def plain(messages: Messages) -> list[tuple[str, str]]:
        kept = [each for each in messages if each["role"] != "system"]
        return [(each["role"], each["content"].strip()) for each in kept]

    return plain(own) == plain(asked)


def _check_ratings(
    values: Mapping[str, Any],
    names: Sequence[str],
    place: Place,
) -> None:
    numbers: list[float] = []
    for name in names:
        try:
            number = float(values[name])
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"{place}: the column {name!r} is {values[name]!r}, not a finite number; correct or "
                "remove the row"
            )
        numbers.append(number)
    chosen, rejected = numbers
    if chosen == rejected:
        raise DataError(
            f"{place}: both answers are rated {chosen:g}, a tie, so neither is preferred; remove "
            "the row"
        )
    if chosen < rejected:
        raise DataError(
            f"{place}: the preferred answer is rated {chosen:g} ({names[0]}), the other "
            f"{rejected:g} ({names[1]}); exchange the columns or correct the row"
        )


def _rows(numbers: Sequence[int], most: int = 12) -> str:
    """ "row 3 has", "rows 3, 4 and 9 have"."""
    if len(numbers) == 1:
        return f"row {numbers[0]} has"
    if len(numbers) > most:
        listed = ", ".join(map(str, numbers[:most]))
        return f"rows {listed} and {len(numbers) - most} more have"
    *first, last = map(str, numbers)
    return f"rows {', '.join(first)} and {last} have"
