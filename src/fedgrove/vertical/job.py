"""The job of a vertical run: one TOML file, checked like every job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, create_model, model_validator

from fedgrove.ground import names
from fedgrove.ground.errors import JobError
from fedgrove.ground.options import Text, Texts, distinct
from fedgrove.ground.plain import Given, Plain
from fedgrove.job import text
from fedgrove.job.sections import Section
from fedgrove.job.sentences import job_error
from fedgrove.job.toml import key_text, parse_assignment, parse_toml, shown

PARTY = "party"
Above = Annotated[float, Field(gt=0)]
METHODS = {"vim": "VIM", "vim-j": "VIM-J", "split": "split learning"}


class PartySection(Section):
    """One party: `[party.NAME]`. It has `columns` of numbers, or a `text`, or, with the labels, nothing
    more.
    """

    path: Text = Field(
        "",
        description="Its table: JSON, JSON lines, CSV or Parquet. A relative path is one from the job "
        "file's folder.",
    )
    columns: Texts | None = Field(
        None,
        description="Its columns of numbers, scaled to mean 0 and variance 1 on the training rows.",
        examples=[["age", "weight"]],
    )
    width: int = Field(
        16,
        ge=0,
        description="Width of the embedding of its columns, one layer and a ReLU. 0: none, a linear "
        "model of the columns; only with vim-j, or the columns themselves would be sent.",
    )
    text: Text | None = Field(
        None,
        description="Its column of texts, read by a frozen base with LoRA.",
        examples=["note"],
    )
    model: Text = Field("minilm", description="Texts: the base, as in a job's model.name.")
    rank: int = Field(8, ge=1, description="Texts: LoRA's rank.")
    alpha: Above | None = Field(
        None, description="Texts: LoRA's alpha. Not set: twice the rank.", examples=[16.0]
    )
    max_length: int = Field(128, ge=4, description="Texts: tokens that are read of each.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.columns is not None:
            distinct("columns", self.columns)
            if self.text is not None:
                raise ValueError("a party has columns or a text; make two parties of one table.")
        return self

    @property
    def speaks(self) -> bool:
        """Whether it has anything beside labels."""
        return self.columns is not None or self.text is not None


class JoinSection(Section):
    """The entities: how rows of the parties are joined, and what is to be predicted."""

    id: Text | None = Field(
        None,
        description="Column of the id, in every party's table. Not set: the row's number, where all "
        "tables have the same entities in one order.",
        examples=["patient"],
    )
    key: Text | None = Field(
        None,
        description="File with the key that the parties share for hashing ids, at least 16 bytes. Not "
        "set: made of the seed, which is enough for a simulation.",
        examples=["join.key"],
    )
    unmatched: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Entities that not all parties have: refuse the run, or leave them out.",
    )
    labels: Text = Field("", description="The party that has the labels.")
    label: Text = Field("label", description="The column of the labels, at that party.")
    test: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Share of the entities that are kept for the test, drawn by the seed."
    )


class VerticalMethodSection(Section):
    """How the parties learn together (docs/vertical.md)."""

    name: Literal["vim", "vim-j", "split"] = Field(
        "vim",
        description="vim: ADMM, the server owns the output weights. vim-j: ADMM, each party owns its "
        "own. split: split learning, a gradient for each message.",
    )
    rho: Above = Field(1.0, description="ADMM's penalty on the shares not adding up.")
    local_steps: int = Field(
        5,
        ge=1,
        description="ADMM: steps of a party for one message (tau); split learning makes one.",
    )
    prox: bool = Field(
        False,
        description="ADMM: hold each party near its last share, for many or redundant parties whose "
        "steps overshoot together.",
    )


class VerticalTrainSection(Section):
    """The training: SGD."""

    epochs: int = Field(20, ge=1, description="Passes over the training entities.")
    batch_size: int = Field(
        64, ge=1, description="Entities of a message; the batches stay the same."
    )
    lr: Above = Field(0.1, description="Learning rate of the parties' embeddings.")
    head_lr: Above | None = Field(
        None, description="Learning rate of the output weights. Not set: lr.", examples=[0.1]
    )
    weight_decay: float = Field(1e-3, ge=0, description="Weight decay, of everything that trains.")
    device: Literal["cpu", "cuda", "mps"] = Field("cpu", description="Where texts are read.")


class VerticalPrivacySection(Section):
    """Client-level differential privacy: a party's messages, each clipped as a whole, with noise."""

    clip: Above | None = Field(
        None,
        description="Largest norm of a message (all numbers of a batch). Not set: no limit.",
        examples=[10.0],
    )
    noise: float = Field(
        0.0, ge=0, description="Standard deviation of the noise on each number, in units of clip."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="The delta at which epsilon is told."
    )
    randomness: Literal["secret", "seed"] = Field(
        "secret",
        description="Where noise comes from: a key of the system, kept in the run's folder, or the "
        "seed, so that runs repeat and nobody who knows the job is kept from subtracting it.",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.noise and self.clip is None:
            raise ValueError("privacy.noise is in units of privacy.clip; set both.")
        return self


class VerticalRunSection(Section):
    """The run."""

    out: Text = Field("runs/vertical", description="Its directory.")
    seed: int = Field(0, ge=0, description="Of the split, the batches and every draw.")
    eval_every: int = Field(
        1, ge=1, description="Epochs between two measures of the test entities."
    )
    alone: bool = Field(
        True,
        description="Also train each party alone, with the labels, to say what joining is worth.",
    )


class Settings(Section):
    """All sections but the parties."""

    data: JoinSection = Field(default_factory=JoinSection, description="The entities.")
    method: VerticalMethodSection = Field(
        default_factory=VerticalMethodSection, description="The method."
    )
    train: VerticalTrainSection = Field(
        default_factory=VerticalTrainSection, description="The training."
    )
    privacy: VerticalPrivacySection = Field(
        default_factory=VerticalPrivacySection, description="Noise."
    )
    run: VerticalRunSection = Field(default_factory=VerticalRunSection, description="The run.")


@dataclass(frozen=True)
class VerticalJob:
    """A vertical run's settings and its parties, in the file's order. Immutable."""

    settings: Any  # Settings, with a section ``party`` that has one of each name
    parties: Mapping[str, PartySection]
    folder: Path = Path()  # what relative paths are from

    @classmethod
    def load(cls, path: Path, changes: Iterable[str] = ()) -> Self:
        """The job in a file, with ``section.key=value`` settings. Raises ``JobError``."""
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
            raise JobError(f"{path} cannot be read ({reason}); name a job file.") from None
        values = parse_toml(content, str(path))
        for change in changes:
            _assign(values, *parse_assignment(change))
        return cls.build(values, str(path), path.parent)

    @classmethod
    def build(cls, values: Given, where: str = "", folder: Path = Path()) -> Self:
        """The job in nested plain data. Raises ``JobError``."""
        tables = values.get(PARTY)
        if not isinstance(tables, Mapping) or not tables:
            raise JobError(f"{_at(where)}there is no party; write a table [party.NAME] for each.")
        for name in tables:
            if not names.PLAIN.fullmatch(name) or hasattr(Section, name):
                raise JobError(
                    f"{_at(where)}party.{key_text(name)}: a party's name has letters a-z, digits and "
                    f". _ - only, and is no word of the program's own; choose another."
                )
        root = _with_parties(tables)
        try:
            settings = root.model_validate(dict(values))
        except ValidationError as error:
            raise job_error(error, root, values, where) from None
        parties = {name: getattr(settings.party, name) for name in tables}
        job = cls(settings, parties, folder)
        job.check(_at(where))
        return job

    def check(self, at: str = "") -> None:
        """Raise ``JobError`` where parties, labels and method do not fit each other."""
        data = self.settings.data
        if data.labels not in self.parties:
            raise JobError(
                f"{at}data.labels = {shown(data.labels)} must name the one party that has the "
                f"labels: {', '.join(self.parties)}."
            )
        if len(self.speaking) < 2:
            raise JobError(
                f"{at}a vertical run needs two parties with columns or a text; here is "
                f"{', '.join(self.speaking) or 'none'}."
            )
        for name, party in self.parties.items():
            self._check_party(name, party, at)

    def _check_party(self, name: str, party: PartySection, at: str) -> None:
        data = self.settings.data
        where = f"{at}party.{name}"
        if not party.path:
            raise JobError(f"{where}: path is missing; name its table.")
        if not party.speaks and name != data.labels:
            raise JobError(
                f"{where} has neither columns nor a text, and the labels are at {data.labels}; give it "
                f"columns = [...] or text = ..., or leave it out."
            )
        used = [*(party.columns or ()), *([party.text] if party.text else [])]
        for column in used:
            if column == data.label:
                raise JobError(
                    f"{where} would read the label itself, the column {shown(column)}; take it out of "
                    f"its columns: labels are at {data.labels} alone."
                )
            if column == data.id:
                raise JobError(f"{where} would learn from the id {shown(column)}; take it out.")
        if party.columns and not party.width and self.settings.method.name != "vim-j":
            raise JobError(
                f"{where}.width = 0 has no embedding, so that {METHODS[self.settings.method.name]} would "
                f'send its columns as they are; set a width, or method.name = "vim-j".'
            )

    @property
    def speaking(self) -> dict[str, PartySection]:
        """The parties that have something to learn from."""
        return {name: party for name, party in self.parties.items() if party.speaks}

    def place(self, path: str) -> Path:
        """Where a path of the job lies."""
        return self.folder / path

    def directory(self) -> Path:
        return Path(self.settings.run.out)

    def to_dict(self) -> dict[str, Plain]:
        """Nested plain data, unset keys left out."""
        return self.settings.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        """The job as a file, every set key written out."""
        return text.to_toml(self.settings)


def explain() -> str:
    """Every key by section with its type, default and description."""
    return text.explain(_with_parties(["NAME"])())


def _with_parties(names: Iterable[str]) -> Any:
    """The whole job's class, with a section for each of these parties."""

    def one() -> PartySection:
        return PartySection()

    fields: Any = {name: (PartySection, Field(default_factory=one)) for name in names}
    tables = create_model("Parties", __base__=Section, __doc__="The parties.", **fields)
    party: Any = (tables, Field(default_factory=tables))
    return create_model("WholeJob", __base__=Settings, party=party)


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _assign(values: Plain, path: tuple[str, ...], value: Any) -> None:
    *above, last = path
    for part in above:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise JobError(f"'{'.'.join(path)}' is no key of a vertical job.")
    if value is None:
        values.pop(last, None)
    else:
        values[last] = value
