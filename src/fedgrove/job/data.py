"""``[data]``: its own keys, those of the job's source, and those of its task, side by side.

A source and a task declare their keys in their ``Options``. The section that a job has is a class
made of the three, so that the keys lie flat in the file, and each part reads its own by name and
type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, cast

from pydantic import (
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from fedgrove.ground.errors import JobError
from fedgrove.ground.marks import Automatic, Chooser, Of, keys_with
from fedgrove.ground.options import COLUMN, OF_THE_DATA, Options, Share, Text, Texts
from fedgrove.ground.plain import Given, Plain
from fedgrove.job.kinds import join, nearest
from fedgrove.job.sections import Section
from fedgrove.job.toml import shown, value_text

if TYPE_CHECKING:
    from fedgrove.federation.sources import Source
    from fedgrove.federation.tasks import Task
    from fedgrove.ground.registry import Registry


class PartitionSection(Section):
    """How one data set is split into clients (flwr-datasets does the splitting; silos need
    none).
    """

    by: Annotated[Text, Chooser()] = Field(
        "dirichlet",
        description='"iid", "dirichlet" (label skew), "sc-dirichlet" (skew over the column '
        '"superclass"), '
        '"pathological" (few classes each), "natural" (a client for each value of a column), or '
        "any other partitioner "
        "of flwr-datasets by its class name.",
    )
    options: Annotated[dict[str, JsonValue], Of("by")] = Field(
        {},
        description="The partitioner's own arguments, for example { alpha = 0.5 } for dirichlet, "
        '{ num_classes_per_partition = 2 } for pathological, { partition_by = "author" } for '
        "natural.",
        examples=[{"alpha": 0.5}],
    )


class DataSection(Section):
    """The rows and what is learnt of them: where they lie, their columns, and each client's
    train/test split.
    """

    source: Annotated[Text, Chooser()] = Field(
        "embedded",
        description="Where the rows come from; each source has keys of its own.",
    )
    task: Annotated[Text, Chooser(), Automatic("data")] = Field(
        "auto",
        description="What is learnt; each task has keys of its own. auto: what the data are for, "
        "where their source knows it; else classify-text.",
    )
    metrics: Annotated[tuple[Text, ...], Field(strict=False), Of("task")] = Field(
        (),
        description="Measures of the finished models beside those that the task has: names of "
        "metrics.",
        examples=[["f1_macro"]],
    )
    group: Annotated[str | None, OF_THE_DATA] = Field(
        None,
        description="Column of natural groups (domain, site, region): the data set is split within "
        "each group, and clients carry its name. Not set, or empty: no groups.",
        examples=["domain"],
    )
    groups: Annotated[Texts | None, OF_THE_DATA] = Field(
        None,
        description="Only the rows of these groups, by name or pattern with * and ?. Not set: all.",
        examples=[["amazon", "tweets"]],
    )
    split: Annotated[Text | None, COLUMN, OF_THE_DATA] = Field(
        None,
        description="Column that says what each row is for, by the words train, test and "
        "validation. Not set: drawn, unless the data come in files or folders of these names.",
        examples=["split"],
    )
    test_fraction: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="Share of each client's examples that is held out for its test, drawn once.",
    )
    validation_fraction: Share = Field(0.0, description="Share that is held out for tuning.")
    train_examples: Annotated[Annotated[int, Field(ge=1)] | None, OF_THE_DATA] = Field(
        None,
        description="At most so many training examples for each client. Not set: all.",
        examples=[60],
    )
    test_examples: Annotated[Annotated[int, Field(ge=1)] | None, OF_THE_DATA] = Field(
        None,
        description="At most so many test examples for each client. Not set: all.",
        examples=[100],
    )
    partition: Annotated[PartitionSection, OF_THE_DATA] = Field(
        default_factory=PartitionSection,
        description="How it is split into clients.",
    )

    learnt: ClassVar[type[Task]]  # the task of a class that has the keys of its parts

    if TYPE_CHECKING:

        def __getattr__(self, key: str) -> Any:
            """The keys of its parts, which no type checker can know."""

    def __new__(cls, /, **values: Any) -> Self:
        """Made by hand, it has the keys of its parts too."""
        if cls is DataSection:
            kind = cls.kind_for(values)
        else:
            kind = cls
        return cast(Self, super().__new__(kind))

    # ------------------------------------------------------------------ asking
    @property
    def source_class(self) -> type[Source]:
        """What reads the rows."""
        from fedgrove.federation.sources import SOURCES

        return SOURCES.find(self.source)

    @property
    def task_class(self) -> type[Task]:
        """What is learnt of them."""
        return _task_of(vars(self), self.source_class)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that the job names; () where it names none, or its task has none."""
        return getattr(self, "labels", None) or ()

    @property
    def called(self) -> str:
        """A word for the data: their path, their name, or what their source is called."""
        words = (getattr(self, key, None) for key in ("path", "name"))
        return next((str(word) for word in words if word), self.source)

    # ------------------------------------------------------------------ the class of a job
    @model_validator(mode="wrap")
    @classmethod
    def _with_the_keys_of_its_parts(
        cls, values: Any, handler: ModelWrapValidatorHandler[Self]
    ) -> Self:
        if cls is not DataSection or not isinstance(values, Mapping):
            return handler(values)
        kind = cls.kind_for(values)
        return cast(Self, kind.model_validate(_without_defaults_of_others(values, kind)))

    @classmethod
    def kind_for(cls, values: Given) -> type[DataSection]:
        """As in Section. Raises ValueError, in a sentence, where a name is none."""
        from fedgrove.federation.sources import SOURCES
        from fedgrove.federation.tasks import TASKS

        source = _named(SOURCES, "data.source", values.get("source", "embedded"))
        task = values.get("task", "auto")
        if task != "auto":
            _named(TASKS, "data.task", task, "auto")
        return _composed((source, _task_of(values, source)))

    @classmethod
    def offered(cls) -> dict[str, FieldInfo]:
        """As in Section."""
        found = dict(cls.model_fields)
        for _, kind in _parts():
            found = {**kind.Options.model_fields, **found}
        return found

    @classmethod
    def ordered(cls) -> list[str]:
        """What chooses first, then the parts' keys."""
        choosers = ["source", "task"]
        own = [key for key in DataSection.model_fields if key not in choosers]
        parts = [key for key in cls.model_fields if key not in DataSection.model_fields]
        return [*choosers, *parts, *own]

    @classmethod
    def others(cls) -> dict[str, tuple[FieldInfo, str]]:
        """As in Section."""
        found: dict[str, tuple[FieldInfo, str]] = {}
        for key, field in cls.offered().items():
            if key not in cls.model_fields:
                parts = _others(key)
                names = [value_text(kind.name) for chooser, kind in parts if chooser == parts[0][0]]
                found[key] = field, f"data.{parts[0][0]} = {join(names)}"
        return found

    @classmethod
    def dropped(
        cls,
        values: Given,
        key: str,
        after: str,
    ) -> list[str]:
        """The keys of a table that another ``source`` or ``task`` drops: those of the old one, and,
        of other data, what they say of the old, the task too where the new data are for one.

        What both inherit from one declaration stays: one's own files stay where they are.
        """
        try:
            before, changed, gone = _changed(values, key, after)
        except ValueError:  # no such source or task: the check of the whole job says so
            return []
        declared = _declared(before)
        gone |= {name for name, owner in declared.items() if not issubclass(changed, owner)}
        if before.learnt is not changed.learnt:
            gone |= set(keys_with(before.model_fields, Of("task")))
        return [name for name in values if name in gone]

    # ------------------------------------------------------------------ checks
    @field_validator("group")
    @classmethod
    def _no_group(cls, group: str | None) -> str | None:
        return group or None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"data.test_fraction = {self.test_fraction} and data.validation_fraction = "
                f"{self.validation_fraction} leave nothing to train on; their sum must be below 1."
            )
        if self.groups is not None and self.group is None:
            raise ValueError(
                f"data.groups = {shown(self.groups)} needs data.group, the column of the groups."
            )
        self._agree_with_clients()
        self._agree_on_metrics()
        return self

    def _agree_with_clients(self) -> None:
        """What comes by client is neither split nor sifted."""
        from fedgrove.federation.sources import Clients

        if not issubclass(self.source_class, Clients):
            return
        if self.partition != PartitionSection():
            raise ValueError(
                f"data.partition.by = {shown(self.partition.by)} has no use with {self.source}, "
                "which are clients already; leave [data.partition] out, or set data.source = "
                '"table".'
            )
        if self.groups is not None:
            raise ValueError(
                f"data.groups = {shown(self.groups)} has no use with {self.source}; leave out the "
                "files of the other groups."
            )

    def _agree_on_metrics(self) -> None:
        """Whether there are such metrics, and the task gives what they need."""
        from fedgrove.federation.metrics import METRICS

        task = self.task_class
        for name in self.metrics:
            metric = _named(METRICS, "each of data.metrics", name)
            missing = [need for need in metric.needs if need not in task.gives]
            if missing:
                raise ValueError(
                    f"data.metrics = {shown(self.metrics)}: {value_text(name)} needs "
                    f"{join(missing, 'and')}, which the task {value_text(task.name)} does not "
                    "give; leave it out."
                )
            if metric.of and task.kind not in metric.of:
                raise ValueError(
                    f"data.metrics = {shown(self.metrics)}: {value_text(name)} measures no answers "
                    f"such as those of the task {value_text(task.name)}; leave it out."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        """The class of a job is made when it is needed, so that pickle finds none by its name."""
        return DataSection.model_validate, (self.model_dump(exclude_none=True),)


# ------------------------------------------------------------------------ the parts' keys
def _parts() -> Iterator[tuple[str, type[Source] | type[Task]]]:
    """Every source and every task, with the key that chooses it."""
    from fedgrove.federation.sources import SOURCES
    from fedgrove.federation.tasks import TASKS

    for source in SOURCES.catalogue().values():
        yield "source", source
    for task in TASKS.catalogue().values():
        yield "task", task


def _task_of(values: Given, source: type[Source]) -> type[Task]:
    from fedgrove.federation.tasks import AUTO, TASKS

    name = values.get("task", "auto")
    if name == "auto":
        name = source.meant_for(values) or AUTO
    return TASKS.find(name)


def _named(
    registry: Registry[Any],
    key: str,
    name: Any,
    *also: str,
) -> type[Any]:
    """The class of a name. Raises ValueError, for pydantic, where there is none."""
    names = [*also, *registry.names()]
    if name in registry.names():
        return registry.find(name)
    if isinstance(name, str):
        guess = nearest(name, names)
    else:
        guess = None
    if guess:
        hint = f"; did you mean {value_text(guess)}?"
    else:
        hint = "."
    raise ValueError(f"{key} must be {join(list(map(value_text, names)))}, not {shown(name)}{hint}")


@cache
def _composed(parts: tuple[type[Source], type[Task]]) -> type[DataSection]:
    """The section with the keys of both. Raises ``JobError`` where two of the three collide."""
    source, task = parts
    owners: dict[str, str] = dict.fromkeys(_own_names(DataSection), "[data]")
    for kind in (source, task):
        for name in _own_names(kind.Options):
            if name in owners:
                raise JobError(
                    f"{kind.Options.__name__} of {kind.name!r} declares {name!r}, which is of "
                    f"{owners[name]} already; call it something else."
                )
            owners[name] = repr(kind.name)
    bases = [kind.Options for kind in (task, source) if kind.Options is not Options]
    fields = {key: _described(key) for key in ("source", "task")}
    model: Any = create_model  # its overloads know no classes that are put together at run time
    made: type[DataSection] = model(
        "DataSection",
        __base__=(*bases, DataSection),
        __doc__=DataSection.__doc__,
        **fields,
    )
    made.learnt = task
    return made


def _own_names(kind: type[Options]) -> set[str]:
    """Keys and validators, which classes that are put together would take from each other."""
    found = kind.__pydantic_decorators__
    return {*kind.model_fields, *found.field_validators, *found.model_validators}


def _described(key: str) -> tuple[Any, FieldInfo]:
    """The field of ``source`` or ``task`` with the words of each choice."""
    field = DataSection.model_fields[key]
    choices = [f"{kind.name}: {kind.about}" for chooser, kind in _parts() if chooser == key]
    words = f"{field.description} {'; '.join(choices)}."
    kind = Annotated[(Text, *field.metadata)]
    return kind, cast(FieldInfo, Field(field.default, description=words))


def _declared(kind: type[Options]) -> dict[str, type[Options]]:
    """The class that declares each key of the parts."""
    found: dict[str, type[Options]] = {}
    for owner in reversed(kind.__mro__):
        if not issubclass(owner, Options) or issubclass(owner, DataSection):
            continue
        for name in vars(owner).get("__annotations__", {}):
            if name in kind.model_fields:
                found.setdefault(name, owner)
    return found


def _changed(
    values: Given,
    key: str,
    after: str,
) -> tuple[type[DataSection], type[DataSection], set[str]]:
    """The class of a table before and after a choice, and what is gone whatever they declare."""
    from fedgrove.federation.sources import SOURCES

    before = DataSection.kind_for(values)
    if key != "source":
        return before, DataSection.kind_for({**values, key: after}), set()
    old = SOURCES.find(values.get("source", "embedded"))
    new = _named(SOURCES, "data.source", after)
    gone = _gone_with(old, new, before)
    kept = {name: value for name, value in values.items() if name not in gone}
    if new.meant_for(kept) is not None:
        gone.add("task")
        kept.pop("task", None)
    return before, DataSection.kind_for({**kept, "source": after}), gone


def _gone_with(
    old: type[Source],
    new: type[Source],
    before: type[DataSection],
) -> set[str]:
    """What another source drops of the keys of its own, and of those that speak of the data."""
    from fedgrove.federation.sources import Clients

    owners = _declared(old.Options)
    if not any(issubclass(new.Options, owner) for owner in owners.values()):
        return {*owners, *keys_with(before.model_fields, OF_THE_DATA)}
    # they read the same data, in other ways
    if issubclass(new, Clients):
        return {"partition", "groups"}
    return set()


# ------------------------------------------------------------------------ keys of other parts
def _without_defaults_of_others(values: Given, kind: type[DataSection]) -> Plain:
    """The values without keys of other sources and tasks that say nothing, as files of earlier
    versions have them. Raises ValueError for one that says something.
    """
    kept: Plain = {}
    for key, value in values.items():
        if key in kind.model_fields:
            others = []
        else:
            others = _others(key)
        if not others:
            kept[key] = value
        elif not any(_is_default(other, key, value) for _, other in others):
            raise ValueError(_of_no_use(key, value, others, values))
    return kept


Part = tuple[str, "type[Source] | type[Task]"]


def _others(key: str) -> list[Part]:
    """The sources and tasks that have a key, each with the key that chooses it."""
    return [(chooser, kind) for chooser, kind in _parts() if key in kind.Options.model_fields]


def _is_default(
    kind: type[Source] | type[Task],
    key: str,
    value: Any,
) -> bool:
    default = kind.Options.model_fields[key].get_default(call_default_factory=True)
    return bool(value == default or (isinstance(default, tuple) and value == list(default)))


def _of_no_use(
    key: str,
    value: Any,
    others: list[Part],
    values: Given,
) -> str:
    """The sentence on a key of another source or task than the job's."""
    chooser = others[0][0]
    chosen = _chosen_name(chooser, values)
    fitting = [value_text(other.name) for key, other in others if key == chooser]
    return (
        f"data.{key} = {shown(value)} has no use with data.{chooser} = {value_text(chosen)}; set "
        f"data.{chooser} to {join(fitting)}, or leave data.{key} out."
    )


def _chosen_name(chooser: str, values: Given) -> str:
    from fedgrove.federation.sources import SOURCES

    source = str(values.get("source", "embedded"))
    if chooser == "source":
        return source
    return _task_of(values, SOURCES.find(source)).name
