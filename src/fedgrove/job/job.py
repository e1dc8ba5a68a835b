"""``Job``: read, change, write and explain one run's settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from fedgrove.ground.errors import JobError
from fedgrove.ground.marks import (
    InsteadOf,
    KeyPath,
    automatic_keys,
    choosers,
    default_of,
    marked,
    sections,
)
from fedgrove.ground.plain import Given, Plain
from fedgrove.job import text
from fedgrove.job.data import DataSection
from fedgrove.job.defence import AttackSection, DefenceSection
from fedgrove.job.kinds import nearest
from fedgrove.job.privacy import PrivacySection
from fedgrove.job.sections import (
    FederationSection,
    LoraSection,
    MethodSection,
    ModelSection,
    RunSection,
    Section,
    TrainSection,
)
from fedgrove.job.sentences import job_error
from fedgrove.job.toml import parse_assignment, parse_toml, shown, value_text

DEFAULT_RANK = 8

Assignment = tuple[tuple[str, ...], Any]


class Job(Section):
    """Everything that a run depends on. Immutable; ``override`` and ``replace`` give a changed
    copy.

    ``Job()`` holds every key's default; ``Job.default()`` is the embedded job that ``fedgrove run``
    falls back to. Built from Python with wrong values it raises pydantic's ``ValidationError``;
    every method here raises ``JobError``.
    """

    model: ModelSection = Field(default_factory=ModelSection, description="The frozen base model.")
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapters.")
    data: SerializeAsAny[DataSection] = Field(
        default_factory=lambda: DataSection.model_validate({}),
        description="The rows and what is learnt of them.",
    )
    federation: FederationSection = Field(
        default_factory=FederationSection,
        description="The clients.",
    )
    method: MethodSection = Field(
        default_factory=MethodSection,
        description="The federated method.",
    )
    train: TrainSection = Field(default_factory=TrainSection, description="The local training.")
    privacy: PrivacySection = Field(
        default_factory=PrivacySection,
        description="Noise and secure aggregation.",
    )
    defence: DefenceSection = Field(
        default_factory=DefenceSection,
        description="Against updates that would spoil the run.",
    )
    attack: AttackSection = Field(
        default_factory=AttackSection,
        description="Attackers among simulated clients.",
    )
    run: RunSection = Field(default_factory=RunSection, description="Rounds, seed and records.")

    # ------------------------------------------------------------------ reading
    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The job in a file. Raises ``JobError`` where it cannot be read, is no TOML, or has wrong
        keys or values.
        """
        path = Path(path)
        try:
            content = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise JobError(
                f"There is no job file {path}; `fedgrove init {path}` writes one to start from."
            ) from None
        except UnicodeDecodeError as error:
            raise JobError(
                f"{path} is no text in UTF-8 (byte {error.start}); a job is a TOML file."
            ) from None
        except IsADirectoryError:
            raise JobError(
                f"{path} is a directory; name the job file in it, for example {path / 'job.toml'}."
            ) from None
        except OSError as error:
            raise JobError(f"{path} cannot be read: {error.strerror or error}.") from None
        return cls.parse(content, where=str(path))

    @classmethod
    def parse(cls, content: str, where: str = "job.toml") -> Self:
        """The job in a TOML text; ``where`` is what its errors call it."""
        return cls.build(parse_toml(content, where), where)

    @classmethod
    def build(cls, values: Given, where: str = "") -> Self:
        """The job in nested plain data, as a TOML file gives it."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise job_error(error, cls, _spread(values), where) from None

    @classmethod
    def default(cls) -> Self:
        """The embedded default: what `fedgrove run` does without a job."""
        return cls.parse(
            files("fedgrove.job").joinpath("default.toml").read_text(encoding="utf-8"),
            "the default job",
        )

    # ------------------------------------------------------------------ changing
    def override(self, settings: Iterable[str], where: str = "") -> Self:
        """A copy with ``section.key=value`` settings, the last one of a key winning.

        A value is a TOML value, a bare word a string; an empty one (``key=``) returns the key to
        its default. A new
        ``method.name``, ``data.source`` or ``data.partition.by`` drops the keys that belonged to
        the old one;
        ``train.local_steps`` and ``train.local_epochs`` replace each other.
        """
        return self._assign([parse_assignment(setting) for setting in settings], where)

    def replace(self, **sections: Given) -> Self:
        """A copy with some keys changed: ``job.replace(train={"device": "cpu"}, lora={"rank":
        8})``; None unsets.
        """
        return self._assign(
            [
                ((name, key), value)
                for name, keys in sections.items()
                for key, value in keys.items()
            ],
            "",
        )

    def _assign(self, assignments: Sequence[Assignment], where: str) -> Self:
        values = self.to_dict()
        assignments = [
            ((*path, "name"), v) if _is_short(path, v) else (path, v) for path, v in assignments
        ]
        given = dict(assignments)
        for chooser in choosers(self):
            if chooser in given:
                self._choose(values, chooser, given[chooser])
        for path, mark in marked(self, InsteadOf):
            other = (*path[:-1], mark.other)
            if given.get(path) is not None and given.get(other) is None:
                _set(values, other, None)
        for path, value in assignments:
            _set(values, path, value)
        return type(self).build(values, where)

    def _choose(
        self,
        values: Plain,
        chooser: KeyPath,
        after: Any,
    ) -> None:
        """Drop from nested ``values`` what belongs to the old choice of ``chooser``."""
        *above, name = chooser
        table = _get(values, tuple(above))
        if not isinstance(table, dict):
            return  # nothing was set that could belong to the old choice
        if after is None:
            after = default_of(self, chooser)
        if after == table.get(name):
            return
        section = dict(sections(self))[tuple(above)]
        assert issubclass(section, Section)
        for key in section.dropped(table, name, after):
            del table[key]

    def opened(self, by: str) -> Self:
        """A copy in which what ``by`` decides at the start (``marks.Automatic``) is open again."""
        changes: dict[str, Plain] = {}
        for section, key in automatic_keys(self, by):
            changes.setdefault(section, {})[key] = None
        return self.replace(**changes)

    def adopting(self, recorded: Self) -> Self:
        """A copy that takes over what another job has decided and this one leaves open."""
        changes: dict[str, Plain] = {}
        for section, key in automatic_keys(self):
            default = default_of(self, (section, key))
            decided = getattr(getattr(recorded, section), key)
            if getattr(getattr(self, section), key) == default and decided != default:
                changes.setdefault(section, {})[key] = decided
        return self.replace(**changes)

    def resolved(self) -> Self:
        """A copy in which what follows from the job alone is written out: lora.rank, lora.alpha,
        train.head_lr.
        """
        ranks = self.federation.ranks
        rank = self.lora.rank or max(
            ranks.values() if isinstance(ranks, dict) else ranks,
            default=DEFAULT_RANK,
        )
        return self.replace(
            lora={
                "rank": rank,
                "alpha": 2.0 * rank if self.lora.alpha is None else self.lora.alpha,
            },
            train={"head_lr": self.train.head_lr or self.train.lr},
        )

    # ------------------------------------------------------------------ asking
    def ranks(self, clients: Sequence[str]) -> dict[str, int]:
        """The rank of each client: a list cycles over them in the given order, a table names each
        of them.
        """
        ranks = self.federation.ranks
        if not isinstance(ranks, dict):
            cycle = ranks or (self.resolved().lora.rank or DEFAULT_RANK,)
            return {name: cycle[index % len(cycle)] for index, name in enumerate(clients)}
        for name in ranks:
            if name not in clients:
                guess = nearest(name, clients)
                meant = (
                    f"; did you mean {value_text(guess)}?"
                    if guess
                    else f"; the clients are {', '.join(clients)}."
                )
                raise JobError(
                    f"federation.ranks gives a rank to {shown(name)}, which is no client{meant}"
                )
        for name in clients:
            if name not in ranks:
                raise JobError(
                    f"federation.ranks has no rank for the client {shown(name)}; give every client "
                    f"one."
                )
        return {name: ranks[name] for name in clients}

    def directory(self) -> Path:
        """The run's directory, ``run.out`` with its places filled in."""
        places = {"{method}": self.method.name, "{seed}": str(self.run.seed)}
        out = self.run.out
        for place, value in places.items():
            out = out.replace(place, value)
        return Path(out)

    def digest(self) -> str:
        """SHA-256 of everything but ``run.out``: two jobs with one digest are the same run.

        An unset key and the same key resolved are different, so compare like with like.
        """
        values = self.to_dict()
        del values["run"]["out"]
        return hashlib.sha256(
            json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    # ------------------------------------------------------------------ writing
    def to_dict(self) -> dict[str, Plain]:
        """Nested plain data, as a TOML file gives it; keys that are not set are left out."""
        values = self.model_dump(mode="json", exclude_none=True)
        values["method"] |= self.method.options.model_dump(mode="json", exclude_none=True)
        return values

    def to_toml(self) -> str:
        """The job as a file, every set key written out in a fixed order: ``Job.parse(job.to_toml())
        == job``.
        """
        return text.to_toml(self)

    def explain(self) -> str:
        """Every key by section with its type, default and description; the method's own keys are
        those of this job.
        """
        return text.explain(self)

    @classmethod
    def template(cls) -> str:
        """A commented job to start from: the embedded default, with every other key as a
        comment.
        """
        return text.template(cls.default())

    # ------------------------------------------------------------------ checks
    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        return _spread(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _agree(self) -> Self:
        ranks, most = self.federation.ranks, self.lora.rank
        named = (
            ranks.items()
            if isinstance(ranks, dict)
            else [(str(index), rank) for index, rank in enumerate(ranks)]
        )
        for name, rank in named:
            if most is not None and rank > most:
                whose = f" of the client {value_text(name)}" if isinstance(ranks, dict) else ""
                raise ValueError(
                    f"federation.ranks = {shown(ranks)}: the rank {rank}{whose} is above lora.rank "
                    f"= {most}; "
                    "lower it, or raise or leave out lora.rank."
                )
        if self.data.task_class.writes:
            self._without_head()
        if self.model.adapter is not None and self.train.dtype == "bfloat16":
            raise ValueError(
                'train.dtype = "bfloat16" would round away most of model.adapter, which is folded '
                'into the base; set it to "float32".'
            )
        if self.lora.dora:
            self._scales_whole_layers()
        return self

    def _scales_whole_layers(self) -> None:
        """DoRA's gains are of the base's own weights, and act on all that a layer gives."""
        beside = {
            "lora.dropout": (
                self.lora.dropout > 0,
                "drops inputs of A alone, and DoRA scales what the layer makes of all",
            ),
            "model.quantize": (
                self.model.quantize != "none",
                "holds weights in few bits, whose norms DoRA needs exactly",
            ),
            "model.adapter": (
                self.model.adapter is not None,
                "is joined to what trained as one product, and DoRA's update is none",
            ),
        }
        for key, (asked, why) in beside.items():
            if asked:
                raise ValueError(f"{key} {why}; leave out {key} or lora.dora.")

    def _without_head(self) -> None:
        """A language model has an output layer of its own: keys of a classifier's head are
        mistakes.
        """
        for name in ("model", "federation"):
            section = getattr(self, name)
            if section.head != type(section).model_fields["head"].default:
                value = shown(section.head)
                raise ValueError(
                    f"{name}.head = {value} has no use with data.task = "
                    f"{value_text(self.data.task_class.name)}; leave it out."
                )


def _is_short(path: tuple[str, ...], value: Any) -> bool:
    return path in (("model",), ("method",)) and isinstance(value, str)


def _spread(values: Given) -> Plain:
    """``model = "name"`` and ``method = "name"`` written out as sections."""
    return {
        key: {"name": value} if _is_short((key,), value) else value for key, value in values.items()
    }


def _get(values: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _set(
    values: Plain,
    path: tuple[str, ...],
    value: Any,
) -> None:
    """Set a leaf; None removes it. What stands in the way of a deeper path gives way (the check
    then says it).
    """
    *above, last = path
    for part in above:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    if value is None:
        values.pop(last, None)
    else:
        values[last] = value
