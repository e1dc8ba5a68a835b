"""Text classification: mean cross-entropy, accuracy, and a linear head on the masked mean of the
last hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedgrove.federation.readers import Place, Row
from fedgrove.federation.tasks.base import SAID_WHERE_SET
from fedgrove.federation.tasks.classifier import Classifier, ClassOptions, class_of
from fedgrove.federation.tasks.texts import ReadsText, TextOptions


class ClassifyTextOptions(ClassOptions, TextOptions):
    """The keys of text classification."""


@dataclass(frozen=True)
class ClassifyText(Classifier, ReadsText[ClassifyTextOptions]):
    """``labels`` in the order of the head's outputs; texts are cut to ``max_length`` tokens."""

    name: ClassVar[str] = "classify-text"
    about: ClassVar[str] = "the class of a text, or of a pair of texts"
    Options: ClassVar[type[ClassifyTextOptions]] = ClassifyTextOptions

    labels: tuple[str, ...]
    max_length: int = 128
    class_weights: str | dict[str, float] = field(default="none", metadata=SAID_WHERE_SET)
    ordinal: bool = field(default=False, metadata=SAID_WHERE_SET)

    @classmethod
    def columns(cls, data: ClassifyTextOptions) -> list[str]:
        """As in Task."""
        return [data.text, *([data.pair] if data.pair else []), data.label]

    @classmethod
    def row(
        cls,
        values: Mapping[str, Any],
        data: ClassifyTextOptions,
        place: Place,
    ) -> Row:
        """``{"text": str, "label": str}``, and ``"pair": str`` where the rows are pairs of
        texts.
        """
        row = cls.texts(values, data, place)
        return {**row, "label": class_of(values[data.label], data, place)}
