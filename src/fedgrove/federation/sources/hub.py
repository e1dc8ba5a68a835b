"""A data set of the Hugging Face hub, or several as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, Strict, model_validator

from fedgrove.federation.readers import Found, Place, Row, Values, label_of
from fedgrove.federation.sources.base import Origin, Rows, origin
from fedgrove.ground.errors import DataError
from fedgrove.ground.options import Options, Text, distinct

PART = "part"  # the column of groups of a federation made of several data sets
#: what parts call their own columns, for the rest of the house
RENAMED = {"text": "text", "pair": "pair", "label": "label", "group": PART}


class PartOptions(Options):
    """One of several hub data sets that a federation is made of; its rows are a group of clients of
    its own.
    """

    name: Text = Field(
        ...,
        description="What the group is called; its labels get this name in front.",
    )
    dataset: Text | None = Field(None, description="Hub data set; not set: data.name.")
    config: Text | None = Field(None, description="Configuration of the hub data set.")
    split: Text = Field("train", description="Which of its splits.")
    text: Text = Field("text", description="Column of the text.")
    pair: Text | None = Field(None, description="Column of the second text, where rows are pairs.")
    label: Text = Field("label", description="Column of the label.")


class HubOptions(Options):
    """The keys of the hub's data sets."""

    name: Text | None = Field(None, description="Name of the hub data set.", examples=["ag_news"])
    config: Text | None = Field(
        None,
        description="Configuration of the hub data set.",
        examples=["default"],
    )
    parts: Annotated[tuple[PartOptions, ...], Strict(False)] = Field(
        (),
        description="Several hub data sets (`[[data.parts]]`), each with columns of its own and a "
        "group of clients: tasks as groups, as in FedTreeLoRA's GLUE setting.",
    )

    @model_validator(mode="after")
    def _something_is_named(self) -> Self:
        if self.name is None and not (self.parts and all(part.dataset for part in self.parts)):
            raise ValueError(
                'data.name is missing: with data.source = "hub" it must name a data set of the '
                'hub, such as "ag_news".'
            )
        return self

    @model_validator(mode="after")
    def _parts_have_columns_of_their_own(self) -> Self:
        if not self.parts:
            return self
        distinct("data.parts", [part.name for part in self.parts])
        fields = type(self).model_fields
        if not {"text", "label"} <= fields.keys():  # of the task
            raise ValueError(
                "data.parts are texts with labels; leave them out, or set data.task to "
                '"classify-text".'
            )
        for key in RENAMED:
            if key in fields and getattr(self, key) != fields[key].default:
                raise ValueError(
                    f"data.{key} has no use with data.parts, which have columns of their own; "
                    "leave it out."
                )
        return self


class HubSource(Rows[HubOptions]):
    """By its name."""

    name: ClassVar[str] = "hub"
    about: ClassVar[str] = "a Hugging Face data set"
    Options: ClassVar[type[HubOptions]] = HubOptions

    def grouped(self) -> str | None:
        """As in Rows."""
        return PART if self.data.parts else None

    def seen(self) -> HubOptions:
        """As in Rows."""
        return self.data.model_copy(update=RENAMED) if self.data.parts else self.data

    def read(self, columns: Sequence[str]) -> Found:
        """As in Rows."""
        if self.data.parts:
            return self._read_parts()
        return self._whole.rows(columns)

    def origin(self, rows: Sequence[Row]) -> Origin:
        """As in Source: of parts, the first one's with the notes of all."""
        if not self.data.parts:
            return self._whole.origin()
        origins = [loaded.origin() for _, loaded in self._parts]
        notes = [f"{each['name']}, {each['note']}" for each in origins]
        return origins[0] | {"note": "; ".join(notes)}

    @cached_property
    def _whole(self) -> Loaded:
        return Loaded(str(self.data.name), self.data.config, None)

    @cached_property
    def _parts(self) -> list[tuple[PartOptions, Loaded]]:
        name = self.data.name
        return [
            (part, Loaded(str(part.dataset or name), part.config, part.split))
            for part in self.data.parts
        ]

    def _read_parts(self) -> Found:
        for part, loaded in self._parts:
            wanted = [part.text, *([part.pair] if part.pair else []), part.label]
            for place, values in loaded.rows(wanted):
                yield place, _renamed(part, values, place)


def _renamed(
    part: PartOptions,
    values: Values,
    place: Place,
) -> Values:
    """The part's columns by the names that all parts share."""
    label = label_of(values[part.label], part.label, place)
    pair = values[part.pair] if part.pair else None
    return {
        "text": values[part.text],
        "pair": pair,
        "label": f"{part.name}: {label}",
        PART: part.name,
    }


class Loaded:
    """One split of a hub data set, class numbers as names; ``split`` None: "train", or the only
    one.
    """

    def __init__(
        self,
        name: str,
        config: str | None,
        split: str | None,
    ):
        self.name, self.config = name, config
        splits = _load(name, config)
        self.split = _chosen(name, list(splits), split)
        self.table = _undecoded(splits[self.split])

    def origin(self) -> Origin:
        """As in Source."""
        info = self.table.info
        note = (
            f"split {self.split!r}, configuration {self.config or 'default'}, version "
            f"{info.version or 'unknown'}"
        )
        return origin(self.name, note, "", info.license or "see the hub")

    def rows(self, wanted: Sequence[str]) -> Iterator[tuple[Place, Values]]:
        """The wanted columns."""
        import datasets

        for column in wanted:
            if column not in self.table.column_names:
                present = ", ".join(self.table.column_names)
                raise DataError(
                    f"the hub data set {self.name!r} has no column {column!r}; it has: {present}"
                )
        features = {
            column: self.table.features[column]
            for column in wanted
            if isinstance(self.table.features[column], datasets.ClassLabel)
        }
        for number, values in enumerate(self.table.select_columns(list(wanted)), start=1):
            for column, feature in features.items():
                values[column] = _class_name(feature, values[column])
            yield f"{self.name}, row {number} of split {self.split!r}", values


def _load(name: str, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except Exception as error:
        # its own classes, the network's, the file system's: all mean the same here
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise DataError(
            f"the hub data set {name!r} cannot be loaded: {reason}; check data.name, data.config "
            'and the network, or use local files (data.source = "silos" or "table")'
        ) from error


def _chosen(
    name: str,
    splits: list[str],
    split: str | None,
) -> str:
    if split in splits:
        return str(split)
    if split is None and "train" in splits:
        return "train"
    if split is None and len(splits) == 1:
        return splits[0]
    wish = split or "train"
    raise DataError(f"the hub data set {name!r} has no split {wish!r}, only: {', '.join(splits)}")


def _undecoded(table: Any) -> Any:
    """Images as their files' bytes: decoded one by one, when they are looked at."""
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _class_name(feature: Any, code: int | None) -> str | None:
    if code is None or code < 0:  # -1 stands for "unlabelled"
        return None
    return str(feature.int2str(code))
