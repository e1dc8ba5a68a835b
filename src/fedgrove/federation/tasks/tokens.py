"""Token classification: entities in a text, as B-I-O tags of its words. A word is read at its first
token; the head sees each token's last hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from fedgrove.federation import spans
from fedgrove.federation.labels import class_among
from fedgrove.federation.metrics.base import Answers
from fedgrove.federation.otherwise import TOKENS
from fedgrove.federation.readers import Place, Row, text_of
from fedgrove.federation.spans import OUTSIDE, Span, Word
from fedgrove.federation.tasks.base import Batch, Example, Stock, f1_of
from fedgrove.federation.tasks.classifier import NamedLabels
from fedgrove.federation.tasks.texts import ReadsText, TextColumnOptions, padded
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import COLUMN, OF_THE_DATA, Column, Text, Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the tag of what is no word, as everywhere in PyTorch
NOWHERE = -1  # the place of a word that was cut off


class TokensOptions(NamedLabels, TextColumnOptions):
    """The keys of texts with entities."""

    spans: Column = Field(
        "spans",
        description="Column of the entities of a text: a list of { start, end, label } in "
        "characters, end excluded, or the JSON of one.",
    )
    words: Annotated[Text | None, COLUMN, OF_THE_DATA] = Field(
        None,
        description="Column of a row's words, a list or a text of them, instead of data.text.",
        examples=["tokens"],
    )
    tags: Annotated[Text | None, COLUMN, OF_THE_DATA] = Field(
        None,
        description="Column of the words' tags (B-I-O and its kin), instead of data.spans.",
        examples=["ner_tags"],
    )
    tag_names: Annotated[Texts | None, OF_THE_DATA] = Field(
        None,
        description="What numbers in data.tags mean, in their order.",
        examples=[["O", "B-PER", "I-PER"]],
    )

    @model_validator(mode="after")
    def _words_with_tags(self) -> Self:
        if (self.words is None) != (self.tags is None):
            raise ValueError(
                "data.words and data.tags go together: the column of a row's words, and that of "
                "their tags."
            )
        return self


@dataclass(frozen=True)
class Tokens(ReadsText[Any]):
    """``labels`` are the types of entities; the head gives 1 + 2k outputs: O, and B and I of each.

    Shapes: w words of the longest row in the batch.
    """

    name: ClassVar[str] = "tokens"
    about: ClassVar[str] = "entities in a text, by tags of its words"
    metric: ClassVar[str] = "entity_f1"
    metrics: ClassVar[tuple[str, ...]] = (
        "entity_precision",
        "entity_recall",
        "entity_f1_by_type",
    )
    gives: ClassVar[tuple[str, ...]] = ("truth", "predicted")
    kind: ClassVar[str] = "tags"
    level: ClassVar[Literal["example", "token"]] = "token"
    classifies: ClassVar[bool] = True
    several: ClassVar[bool] = True
    learns: ClassVar[str] = "spans"
    suits: ClassVar[tuple[str, ...]] = (TOKENS,)
    stock: ClassVar[Stock] = Stock("AutoModelForTokenClassification", "TOKEN_CLS")
    Options: ClassVar[type[TokensOptions]] = TokensOptions

    labels: tuple[str, ...]
    max_length: int = 128

    @property
    def output_names(self) -> tuple[str, ...]:
        """The tags."""
        inside = [f"{letter}-{label}" for label in self.labels for letter in "BI"]
        return (OUTSIDE, *inside)

    @property
    def outputs(self) -> int:
        """One for each tag."""
        return 1 + 2 * len(self.labels)

    # -------------------------------------------------------------------- rows
    @classmethod
    def columns(cls, data: TokensOptions) -> list[str]:
        """As in Task."""
        if data.words and data.tags:
            return [data.words, data.tags]
        return [data.text, data.spans]

    @classmethod
    def answer_columns(cls, data: TokensOptions) -> list[str]:
        """As in Task."""
        return [cls.columns(data)[1]]

    @classmethod
    def row(
        cls,
        values: Mapping[str, Any],
        data: TokensOptions,
        place: Place,
    ) -> Row:
        """``{"text": str, "words": [[start, end], ...], "spans": [[start, end, type], ...]}``, and
        "label", the set of the types.
        """
        row = cls.question(values, data, place)
        if data.words and data.tags:
            count = len(row["words"])
            tags = spans.tag_list(
                values[data.tags],
                count,
                data.tag_names,
                data.tags,
                place,
            )
            found = spans.spans_of_tags(tags, row["words"])
        else:
            given = values[data.spans]
            found = spans.checked_spans(given, row["text"], row["words"], data.spans, place)
        if data.labels:
            found = [[*where, _known(kind, data.labels, place)] for *where, kind in found]
        return {**row, **_named(found)}

    @classmethod
    def question(
        cls,
        values: Mapping[str, Any],
        data: TokensOptions,
        place: Place,
    ) -> Row:
        """As in Task."""
        if data.words:
            text, words = spans.joined(spans.word_list(values[data.words], data.words, place))
            return {"text": text, "words": words}
        text = text_of(values[data.text], data.text, place)
        return {"text": text, "words": spans.words_of(text)}

    @classmethod
    def classes_in(cls, row: Row) -> Sequence[str]:
        """The type of each entity."""
        return [kind for _, _, kind in row["spans"]]

    @classmethod
    def respell(cls, row: Row, names: Mapping[str, str]) -> None:
        """As in Task."""
        row.update(_named([[*where, names[kind]] for *where, kind in row["spans"]]))

    # ---------------------------------------------------------------- examples
    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase) -> list[Example]:
        """As in Task: beside the input the text, where its words stand, the place of each word's
        first token, and "label", each word's tag.
        """
        if not getattr(processor, "is_fast", False):
            raise DataError(
                "the model's tokenizer does not say where its tokens stand in a text, which tags of "
                "words need; choose a model with a fast tokenizer"
            )
        return [self._example(row, number, processor) for number, row in enumerate(rows, start=1)]

    def _example(
        self,
        row: Row,
        number: int,
        processor: Any,
    ) -> Example:
        text = row["text"]
        words = row.get("words") or spans.words_of(text)
        tokens = processor(
            text,
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
        )
        example: Example = {
            "input_ids": list(tokens["input_ids"]),
            "text": text,
            "words": words,
            "places": _places(words, tokens["offset_mapping"]),
        }
        if all(place == NOWHERE for place in example["places"]):
            raise DataError(
                f"row {number} has a text of which the tokenizer keeps no word; remove it"
            )
        if self.learns in row:
            example["label"] = self.target({**row, "words": words}, number)
        return example

    def target(self, row: Row, number: int) -> list[int]:
        """The number of each word's tag. Raises DataError for a type that the task does not have, and
        for spans as ``checked_spans`` does.
        """
        place = f"row {number}"
        found = spans.checked_spans(
            row["spans"],
            row["text"],
            row["words"],
            "spans",
            place,
        )
        found = [[*where, _known(kind, self.labels, place)] for *where, kind in found]
        numbers = {name: index for index, name in enumerate(self.output_names)}
        return [numbers[tag] for tag in spans.tags_of_spans(found, row["words"])]

    def targets(self, examples: Sequence[Example]) -> Int[Tensor, "b w"]:
        """The tags' numbers, ``IGNORED`` after a row's last word."""
        return self._filled([example["label"] for example in examples], IGNORED)

    def label_tensors(self, examples: Sequence[Example]) -> Batch:
        """Tags and places [b, w]."""
        places = self._filled([example["places"] for example in examples], NOWHERE)
        return {"labels": self.targets(examples), "places": places}

    @staticmethod
    def _filled(rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "b w"]:
        return padded(rows, max(len(row) for row in rows), fill)

    # ---------------------------------------------------------------- measures
    def loss(self, logits: Float[Tensor, "b t c"], batch: Batch) -> Float[Tensor, ""]:
        """The mean cross-entropy over the words that have a first token of their own."""
        return F.cross_entropy(*self._at_words(logits, batch), ignore_index=IGNORED)

    def score(self, logits: Float[Tensor, "b t c"], batch: Batch) -> dict[str, float]:
        """Sums: the loss of words, words, entities that are right, answered and due, rows."""
        found, wanted = self._at_words(logits, batch)
        tags = zip(
            batch["labels"].tolist(),
            batch["places"].tolist(),
            logits,
            strict=True,
        )
        right = answered = due = 0
        for numbers, places, row in tags:
            truth = [number for number in numbers if number != IGNORED]
            mine = self._entities(self._tags_at(row, places[: len(truth)]))
            theirs = self._entities([self.output_names[number] for number in truth])
            right += len(mine & theirs)
            answered += len(mine)
            due += len(theirs)
        return {
            "loss": float(F.cross_entropy(found, wanted, ignore_index=IGNORED, reduction="sum")),
            "words": float((wanted != IGNORED).sum()),
            "right": float(right),
            "answered": float(answered),
            "due": float(due),
            "examples": float(len(logits)),
        }

    def measure(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean loss of a word, F1 over entities (0 where none is due and none answered)."""
        return {
            "loss": sums["loss"] / sums["words"],
            "entity_f1": f1_of(sums),
            "examples": sums["examples"],
        }

    def compared(self, found: Float[Tensor, "n t c"], examples: Sequence[Example]) -> Answers:
        """Lists of tags."""
        truth = [[self.output_names[number] for number in each["label"]] for each in examples]
        return Answers(
            labels=self.labels,
            truth=_objects(truth),
            predicted=_objects(self._predicted(found, examples)),
        )

    def told_of(
        self, logits: Float[Tensor, "n t c"], examples: Sequence[Example]
    ) -> list[list[dict[str, Any]]]:
        """The entities of each text."""
        found: list[list[dict[str, Any]]] = []
        for tags, example in zip(self._predicted(logits, examples), examples, strict=True):
            own = spans.spans_of_tags(tags, example["words"])
            found.append([_told(span, example["text"]) for span in own])
        return found

    def scored(self, logits: Float[Tensor, "n t c"]) -> list[dict[str, float]]:
        """None: an entity is of several words."""
        return [{} for _ in logits]

    # ------------------------------------------------------------------ words
    def _at_words(
        self, logits: Float[Tensor, "b t c"], batch: Batch
    ) -> tuple[Float[Tensor, "words c"], Int[Tensor, " words"]]:
        """The logits at each word's first token, and the tag that is due there: ``IGNORED`` for a
        word that was cut off or shares its token with the one before.
        """
        places = batch["places"]
        index = places.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1])
        before = torch.nn.functional.pad(places, (1, 0), value=NOWHERE)[:, :-1]
        own = (places != NOWHERE) & (places != before)
        wanted = batch["labels"].masked_fill(~own, IGNORED)
        return logits.gather(1, index).flatten(0, 1), wanted.flatten()

    def _predicted(
        self, logits: Float[Tensor, "n t c"], examples: Sequence[Example]
    ) -> list[list[str]]:
        pairs = zip(logits, examples, strict=True)
        return [self._tags_at(row, example["places"]) for row, example in pairs]

    def _tags_at(self, logits: Float[Tensor, "t c"], places: Sequence[int]) -> list[str]:
        """Each word's tag: O for one that was cut off; one that shares its token with the word before
        goes on with its entity.
        """
        chosen = logits.argmax(-1).tolist()
        tags = [
            OUTSIDE if place == NOWHERE else self.output_names[chosen[place]] for place in places
        ]
        for number, (before, place) in enumerate(pairwise(places), start=1):
            if place == before and tags[number].startswith("B-"):
                tags[number] = f"I-{tags[number][2:]}"
        return tags

    @staticmethod
    def _entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
        """(first word, last word and one, type) of each."""
        words = [[number, number + 1] for number in range(len(tags))]
        return {(first, end, kind) for first, end, kind in spans.spans_of_tags(tags, words)}


def _named(found: list[Span]) -> Row:
    """A row's spans, and a name for the set of their types."""
    return {"spans": found, "label": " + ".join(sorted({kind for _, _, kind in found}))}


def _known(
    label: str,
    labels: Sequence[str],
    place: Place,
) -> str:
    """The one of the labels that a type spells."""
    known = class_among(label, labels)
    if known is None:
        listed = ", ".join(map(repr, labels))
        raise DataError(
            f"{place}: the entity type {label!r} is none of {listed}; add it to data.labels or "
            "correct it"
        )
    return known


def _places(words: Sequence[Word], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The first token that has a part of each word; ``NOWHERE`` where none has."""
    places: list[int] = []
    token = 0
    for start, end in words:
        while token < len(offsets) and (
            offsets[token][1] <= start or offsets[token][0] == offsets[token][1]
        ):
            token += 1
        has = token < len(offsets) and offsets[token][0] < end
        places.append(token if has else NOWHERE)
    return places


def _told(span: Span, text: str) -> dict[str, Any]:
    start, end, kind = span
    return {"start": start, "end": end, "label": kind, "text": text[start:end]}


def _objects(rows: Sequence[list[str]]) -> Any:
    """[n] of lists."""
    found = np.empty(len(rows), dtype=object)
    for number, row in enumerate(rows):
        found[number] = row
    return found
