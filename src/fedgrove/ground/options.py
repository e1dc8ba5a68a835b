"""What a part that is chosen by name declares of its own: keys, with types, bounds and words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

from fedgrove.ground.marks import NamesColumn, Of
from fedgrove.ground.toml import shown, value_text

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1), Strict(False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Options(BaseModel):
    """Immutable, no unknown keys, no silent conversion of one type into another.

    Every key has a default and a description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


#: the key says something of one data set, so that another data.source drops it
OF_THE_DATA = Of("source")
COLUMN = NamesColumn()

Column = Annotated[Text, COLUMN, OF_THE_DATA]


def distinct(key: str, names: Sequence[str]) -> None:
    """Raises ValueError, for pydantic, where a key's list names something twice."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"{key} = {shown(names)} names {value_text(twice[0])} twice; name each once."
        )
