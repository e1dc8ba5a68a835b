"""The sections of a job. Each key's type, bounds, default and description stand here and nowhere
else.

``None`` means "not set": TOML has no null, so such a key is left out, and its description says what
happens then.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SkipValidation,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from fedgrove.job.kinds import join, nearest
from fedgrove.job.marks import Automatic, Chooser, InsteadOf, Of, Only, useless_keys
from fedgrove.job.toml import shown, value_text


class Section(BaseModel):
    """A table of the job: immutable, no unknown keys, no silent conversion of one type into
    another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1), Strict(False)]
Rank = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
AutoCount = Literal["auto"] | Annotated[int, Field(ge=1)]


#: models that Fedgrove fetches by itself, or brings along; they have one version
EMBEDDED_MODELS = ("minilm", "mpnet-base", "minimind2-small", "smollm2-135m", "grove-vit")


class ModelSection(Section):
    """The frozen base model, the same for every client. `model = "name"` is short for its name
    alone.
    """

    name: Text = Field(
        "minilm",
        description='The embedded encoders "minilm" and "mpnet-base", the embedded decoders "minimind2-small" and '
        '"smollm2-135m", '
        'the embedded image encoder "grove-vit", a Hugging Face model name, or a folder with a '
        "model in it.",
    )
    revision: Text | None = Field(
        None,
        description="Commit, tag or branch of a hub model; not set: its main branch.",
        examples=["main"],
    )
    head: Literal["pooled", "stock"] = Field(
        "pooled",
        description="The classifier: masked mean of the last layer and one linear layer of ours, "
        "or the head that "
        "the architecture itself has for sequence classification.",
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Hold the frozen base in 8 or 4 bits (bitsandbytes, on a CUDA GPU): less "
        "memory, a little less "
        "exact; adapters are not affected.",
    )

    @model_validator(mode="after")
    def _agree(self) -> ModelSection:
        if self.quantize != "none" and self.head == "stock":
            raise ValueError(
                f"model.quantize = {value_text(self.quantize)} would round the stock head, which "
                f"is trained; set "
                'model.head = "pooled", or leave model.quantize out.'
            )
        if self.revision is not None and self.name in EMBEDDED_MODELS:
            raise ValueError(
                f"model.revision = {shown(self.revision)} has no use with the embedded model; "
                f"leave it out, or set "
                "model.name to a model of the hub."
            )
        return self


class LoraSection(Section):
    """The low-rank adapters: rank, scale and place."""

    rank: Rank | None = Field(
        None,
        description="Global rank R; no client's rank is larger. Not set: the largest of "
        "federation.ranks, else 8.",
        examples=[8],
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Numerator of the scale. Not set: 2 R.", examples=[16.0]
    )
    scaling: Literal["global", "client"] = Field(
        "global",
        description="The scale of a client of rank r: alpha / R for every client, or alpha / r for "
        "each.",
    )
    dropout: Share = Field(0.0, description="Dropout on the input of each adapter while training.")
    targets: Literal["auto"] | Texts = Field(
        "auto",
        description="Adapted linear layers: query and value of every attention layer, or patterns "
        "for module paths "
        '(a whole path, its last parts, or with * and ?), for example ["query", "*.dense"].',
    )


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


class PartSection(Section):
    """One of several hub data sets that a federation is made of; its rows are a group of clients of
    its own.
    """

    name: Text = Field(
        ..., description="What the group is called; its labels get this name in front."
    )
    dataset: Text | None = Field(None, description="Hub data set; not set: data.name.")
    config: Text | None = Field(None, description="Configuration of the hub data set.")
    split: Text = Field("train", description="Which of its splits.")
    text: Text = Field("text", description="Column of the text.")
    pair: Text | None = Field(None, description="Column of the second text, where rows are pairs.")
    label: Text = Field("label", description="Column of the label.")


EMBEDDED = "sentiment"
TASKS = ("classify-text", "classify-images", "generate")
CLASSIFIES = Only("task", "classify-text", "classify-images")


class DataSection(Section):
    """The texts and their labels: where they lie, their columns, and each client's train/test
    split.
    """

    source: Annotated[
        Literal["embedded", "silos", "table", "hub"],
        Chooser(alike=(("silos", "table"),)),  # one's own files stay where they are
    ] = Field(
        "embedded",
        description="embedded: a data set that Fedgrove fetches and checks by itself; silos: a "
        "folder with one file "
        "(jsonl, csv, parquet) for each client, or of images, CLIENT/LABEL/*.png; table: one such "
        "file, or a folder of "
        "images, LABEL/*.png, to be split; hub: a Hugging Face data set.",
    )
    task: Annotated[
        Literal["auto", "classify-text", "classify-images", "generate"],
        Chooser(alike=(TASKS,), open="auto"),
        Automatic("data"),
        Only("source", "silos", "table", "hub"),  # an embedded set is for one task
    ] = Field(
        "auto",
        description="What is learnt. auto: what an embedded data set is for; else classify-text.",
    )
    name: Annotated[Text, Of("source"), Only("source", "embedded", "hub")] = Field(
        EMBEDDED, description="Name of the embedded or hub data set."
    )
    config: Annotated[Text | None, Of("source"), Only("source", "hub")] = Field(
        None, description="Configuration of a hub data set.", examples=["default"]
    )
    path: Annotated[Text | None, Of("source"), Only("source", "silos", "table")] = Field(
        None,
        description="The folder of silos, or the table; from the working directory.",
        examples=["silos"],
    )
    parts: Annotated[
        tuple[PartSection, ...],
        Strict(False),
        Of("source"),
        Only("source", "hub"),
        Only("task", "classify-text"),
    ] = Field(
        (),
        description="Several hub data sets (`[[data.parts]]`), each with columns of its own and a "
        "group of clients: "
        "tasks as groups, as in FedTreeLoRA's GLUE setting.",
    )
    text: Annotated[Text, Of("source"), Only("task", "classify-text")] = Field(
        "text", description="Column of the text."
    )
    pair: Annotated[Text | None, Of("source"), Only("task", "classify-text")] = Field(
        None,
        description="Column of a second text, where each row is a pair (a claim and its evidence, "
        "two questions); "
        "a row may leave it empty.",
        examples=["pair"],
    )
    image: Annotated[Text, Of("source"), Only("task", "classify-images")] = Field(
        "image", description="Of classify-images: column of the image, the bytes of its file."
    )
    label: Annotated[Text, Of("source"), CLASSIFIES] = Field(
        "label", description="Column of the label."
    )
    prompt: Annotated[Text, Of("source"), Only("task", "generate")] = Field(
        "prompt", description="Of generation: column of the prompt."
    )
    completion: Annotated[Text, Of("source"), Only("task", "generate")] = Field(
        "completion",
        description="Of generation: column of the text to learn; a list of texts: the first is "
        "learnt, each is right.",
    )
    messages: Annotated[Text | None, Of("source"), Only("task", "generate")] = Field(
        None,
        description="Of generation: column of a conversation, a list of { role, content } that "
        "ends with the "
        "assistant, instead of prompt and completion.",
        examples=["messages"],
    )
    group: Annotated[str | None, Of("source")] = Field(
        None,
        description="Column of natural groups (domain, site, region): the data set is split within "
        "each group, and "
        "clients carry its name. Not set, or empty: no groups.",
        examples=["domain"],
    )
    groups: Annotated[Texts | None, Of("source"), Only("source", "embedded", "table", "hub")] = (
        Field(
            None,
            description="Only the rows of these groups, by name or pattern with * and ?. Not set: all.",
            examples=[["amazon", "tweets"]],
        )
    )
    labels: Annotated[
        Annotated[tuple[Text, ...], Field(min_length=2), Strict(False)] | None,
        Automatic("data"),
        Of("source"),
        CLASSIFIES,
    ] = Field(
        None,
        description="The classes in their order, which all sites must agree on. Not set: those in "
        "the training data, "
        "sorted.",
        examples=[["negative", "positive"]],
    )
    max_length: Annotated[int, Only("task", "classify-text", "generate")] = Field(
        128,
        ge=4,
        description="Tokens of a text, special ones included; the rest is cut off. Of generation: "
        "of prompt and "
        "completion together; a longer row loses the start of its prompt.",
    )
    max_new_tokens: Annotated[int, Only("task", "generate")] = Field(
        48, ge=1, description="Of generation: the most tokens that the model writes."
    )
    generate_examples: Annotated[int, Only("task", "generate")] = Field(
        16,
        ge=1,
        description="Of generation: how many test rows of a client are generated for ROUGE and "
        "exact match.",
    )
    test_fraction: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="Share of each client's examples that is held out for its test, drawn once.",
    )
    validation_fraction: Share = Field(0.0, description="Share that is held out for tuning.")
    train_examples: Annotated[Annotated[int, Field(ge=1)] | None, Of("source")] = Field(
        None,
        description="At most so many training examples for each client. Not set: all.",
        examples=[60],
    )
    test_examples: Annotated[Annotated[int, Field(ge=1)] | None, Of("source")] = Field(
        None,
        description="At most so many test examples for each client. Not set: all.",
        examples=[100],
    )
    partition: Annotated[
        PartitionSection, Of("source"), Only("source", "embedded", "table", "hub")
    ] = Field(default_factory=PartitionSection, description="How it is split into clients.")

    @field_validator("group")
    @classmethod
    def _no_group(cls, group: str | None) -> str | None:
        return group or None

    @model_validator(mode="after")
    def _agree(self) -> DataSection:
        source = value_text(self.source)
        if self.source in ("silos", "table"):
            if self.path is None:
                what = (
                    "the folder with one file for each client"
                    if self.source == "silos"
                    else "the table's file"
                )
                raise ValueError(
                    f"data.path is missing: with data.source = {source} it must name {what}."
                )
            for key in ("name", "config"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    value = shown(getattr(self, key))
                    raise ValueError(
                        f"data.{key} = {value} has no use with data.source = {source}; leave it "
                        f"out."
                    )
        elif self.path is not None:
            raise ValueError(
                f"data.path = {shown(self.path)} has no use with data.source = {source}; "
                'set data.source to "silos" (a folder) or "table" (a file), or leave data.path out.'
            )
        if self.source == "embedded" and self.config is not None:
            raise ValueError(
                f'data.config = {shown(self.config)} needs data.source = "hub"; leave it out.'
            )
        if (
            self.source == "hub"
            and self.name == EMBEDDED
            and not (self.parts and all(p.dataset for p in self.parts))
        ):
            raise ValueError(
                'data.name is missing: with data.source = "hub" it must name a data set of the '
                'hub, such as "ag_news".'
            )
        if self.parts and self.source != "hub":
            raise ValueError(
                f'data.parts has no use with data.source = {source}; set it to "hub", or leave it '
                f"out."
            )
        if self.parts:
            _distinct("data.parts", tuple(part.name for part in self.parts))
            for key in ("text", "pair", "label", "group"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"data.{key} has no use with data.parts, which have columns of their own; "
                        f"leave it out."
                    )
        if self.source == "silos" and self.partition != PartitionSection():
            raise ValueError(
                f"data.partition.by = {shown(self.partition.by)} has no use with silos, which are "
                f"clients already; "
                'leave [data.partition] out, or set data.source = "table".'
            )
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"data.test_fraction = {self.test_fraction} and data.validation_fraction = "
                f"{self.validation_fraction} "
                "leave nothing to train on; their sum must be below 1."
            )
        if self.labels is not None:
            _distinct("data.labels", self.labels)
        if self.groups is not None and self.group is None:
            raise ValueError(
                f"data.groups = {shown(self.groups)} needs data.group, the column of the groups."
            )
        if self.groups is not None and self.source == "silos":
            raise ValueError(
                f"data.groups = {shown(self.groups)} has no use with silos; leave out the files of "
                f"the other groups."
            )
        self._of_the_task()
        return self

    def _of_the_task(self) -> None:
        """Keys of another task than the one named are mistakes."""
        unused = useless_keys(type(self), vars(self), "task")
        beside = dict.fromkeys(unused, "task")
        if self.task == "generate":
            if self.messages is not None:
                beside |= {"prompt": "messages", "completion": "messages"}
            elif self.prompt == self.completion:
                raise ValueError(
                    f"data.prompt and data.completion are both {shown(self.prompt)}, so a model "
                    f"would learn to repeat; "
                    "name two columns."
                )
        for key, chosen in beside.items():
            if getattr(self, key) != type(self).model_fields[key].default:
                value = shown(getattr(self, chosen))
                raise ValueError(
                    f"data.{key} has no use with data.{chosen} = {value}; leave it out."
                )


class FederationSection(Section):
    """The clients, their budgets, and who takes part."""

    clients: int = Field(
        16,
        ge=1,
        description='How many clients a data set is split into ("natural" splits and silos have '
        "their own).",
    )
    fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the clients that train in each round, drawn anew."
    )
    ranks: Annotated[tuple[Rank, ...], Strict(False)] | dict[str, Rank] = Field(
        (),
        description="Each client's rank: a list, which cycles over the clients, or a table { name "
        "= rank }. "
        "Empty: lora.rank for all.",
        examples=[[4, 8]],
    )
    held_out: Share | Texts = Field(
        0.0,
        description="Clients that never train and arrive at the end: a share of them, or their "
        "names.",
    )
    head: Literal["local", "shared", "frozen"] = Field(
        "local",
        description="The classifier's head: each client's own, averaged by the server, or left as "
        "it was drawn.",
    )
    newcomer_head: Annotated[Literal["auto"] | bool, Automatic("data")] = Field(
        "auto",
        description="Whether clients also send their own heads, whose mean a held-out client "
        "starts from; "
        "auto: where there are held-out clients.",
    )
    min_clients: int = Field(
        1,
        ge=1,
        description="A round with fewer usable updates stops the run, which --resume continues.",
    )
    deadline: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Seconds that a round waits for its clients, where they train in other "
        "processes. Not set: until "
        "all have answered.",
        examples=[600.0],
    )
    late: Literal["drop", "next"] = Field(
        "drop",
        description="An update that misses the deadline: not used, or used in the round in which "
        "it arrives.",
    )

    @model_validator(mode="after")
    def _agree(self) -> FederationSection:
        if isinstance(self.held_out, tuple):
            _distinct("federation.held_out", self.held_out)
        if self.late == "next" and self.deadline is None:
            raise ValueError(
                'federation.late = "next" has no use without federation.deadline; set one, or '
                "leave it out."
            )
        return self


class MethodSection(Section):
    """The federated method and its own keys (`fedgrove methods` lists them all)."""

    name: Annotated[Text, Chooser()] = Field("fedit", description="Name of the method.")
    uniform_rank: Literal["min", "max"] | None = Field(
        None,
        description="Where a method needs equal ranks and federation.ranks differ: give every "
        "client the smallest or "
        "the largest. Not set: such a job is refused.",
        examples=["min"],
    )
    # An instance of the method's own ``Options``; in TOML its keys stand beside the name.
    options: SkipValidation[Any] = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _own_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("name", cls.model_fields["name"].default)
        common = {key: value for key, value in values.items() if key in ("name", "uniform_rank")}
        if not isinstance(name, str) or not name:
            return common  # the type of the name is the error; what its keys would be is unknown
        options = options_of(name)
        given = values.get("options")
        own = given.model_dump() if isinstance(given, BaseModel) else {}
        own |= {
            k: v
            for k, v in values.items()
            if k not in common and not (k == "options" and isinstance(v, BaseModel))
        }
        try:
            return common | {"options": options.model_validate(own)}
        except ValidationError as error:
            raise OptionsError(error, options) from None


class OptionsError(ValueError):
    """Carries what is wrong with a method's own keys through pydantic, which would flatten it to a
    text.
    """

    def __init__(self, error: ValidationError, options: type[BaseModel]):
        super().__init__(str(error))
        self.error = error
        self.options = options


def options_of(name: str) -> type[BaseModel]:
    """The model of a method's own keys. This may import the methods, and with them torch."""
    from fedgrove.methods import registry

    known = registry.names()
    if name not in known:
        guess = nearest(name, known)
        meant = f"did you mean {value_text(guess)}? There" if guess else "there"
        raise ValueError(
            f"method.name = {shown(name)} is no method; {meant} are {join(known, 'and')}."
        )
    return registry.options_of(name)


class TrainSection(Section):
    """What a client does in a round, and on what device."""

    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="The optimiser; its state starts anew each round."
    )
    lr: float = Field(1e-3, gt=0, description="Learning rate of the adapters.")
    head_lr: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Learning rate of the classifier's head. Not set: that of the adapters.",
        examples=[1e-3],
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay (AdamW), or L2 (SGD)."
    )
    momentum: Share = Field(0.0, description="Momentum of SGD.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="The learning rate over a client's steps of one round."
    )
    warmup_fraction: Share = Field(
        0.0, description="Share of those steps in which the learning rate rises from zero."
    )
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    batch_size: int = Field(8, ge=1, description="Examples in a batch.")
    accumulation: int = Field(1, ge=1, description="Batches whose gradients make one step.")
    local_steps: Annotated[Annotated[int, Field(ge=1)] | None, InsteadOf("local_epochs")] = Field(
        8,
        description="Optimiser steps of a client in a round; or local_epochs, not both.",
        examples=[8],
    )
    local_epochs: Annotated[Annotated[int, Field(ge=1)] | None, InsteadOf("local_steps")] = Field(
        None,
        description="Passes over the client's data in a round, instead of local_steps.",
        examples=[1],
    )
    final_local_epochs: int = Field(
        0,
        ge=0,
        description="Passes of local fine-tuning after the last round, shown as metric_tuned.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: less memory, more time."
    )
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Automatic("machine")] = Field(
        "auto", description="auto: the best that there is."
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Automatic("machine")] = Field(
        "auto",
        description="Precision of the frozen base; adapters are float32. auto: bfloat16 where that "
        "is faster.",
    )
    threads: Annotated[AutoCount, Automatic("machine")] = Field(
        "auto", description="CPU threads; auto: one for each core that the process may use."
    )
    eval_batch_size: Annotated[AutoCount, Automatic("machine")] = Field(
        "auto",
        description="Examples in a batch of the evaluation; auto: 128, of a language model 64.",
    )
    cohort: Annotated[AutoCount, Automatic("machine")] = Field(
        "auto",
        description="Clients that train in one batch; auto: what keeps the device busy and fits "
        "train.memory.",
    )
    memory: Literal["auto"] | Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?[MG]B$")] = Field(
        "auto",
        description="What a cohort's activations and adapters may take; auto: half of what is "
        "free.",
        examples=["4GB"],
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_steps(cls, values: Any) -> Any:
        # The default of local_steps must not stand in the way of a job that gives epochs alone.
        if (
            isinstance(values, dict)
            and values.get("local_epochs") is not None
            and "local_steps" not in values
        ):
            return values | {"local_steps": None}
        return values

    @model_validator(mode="after")
    def _agree(self) -> TrainSection:
        if (self.local_steps is None) == (self.local_epochs is None):
            both = self.local_steps is not None
            raise ValueError(
                f"train.local_steps = {value_text(self.local_steps)} and train.local_epochs = "
                f"{value_text(self.local_epochs)} are {'both' if both else 'neither'} set; give "
                f"exactly one of them."
            )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"train.momentum = {self.momentum} has no use with train.optimizer = "
                f"{value_text(self.optimizer)}; "
                'leave it out, or set train.optimizer = "sgd".'
            )
        return self


class RunSection(Section):
    """Rounds, seed, and what is recorded where."""

    rounds: int = Field(8, ge=1, description="Rounds of the federation.")
    seed: int = Field(
        0,
        ge=0,
        description="All randomness comes from it: splits, initial weights, order, selection.",
    )
    out: Text = Field(
        "runs/{method}",
        description="The run's directory; {method} and {seed} stand for the job's own.",
    )
    eval_every: int = Field(
        1, ge=1, description="Rounds between evaluations; the last round is always evaluated."
    )
    checkpoint_every: int = Field(
        1, ge=1, description="Rounds between checkpoints, which --resume starts from."
    )
    noise: bool = Field(
        False,
        description="Record initialisation and aggregation noise of each round in noise.jsonl.",
    )
    compress: Literal["none", "fp16", "int8"] = Field(
        "none",
        description="How numbers travel, up and down: as they are, in half precision, or in 8 bits "
        "with a scale for "
        "each rank index.",
    )

    @field_validator("out")
    @classmethod
    def _places(cls, out: str) -> str:
        for place in re.findall(r"\{(.*?)\}", out):
            if place not in ("method", "seed"):
                raise ValueError(
                    f"{{{place}}} stands for nothing; only {{method}} and {{seed}} do."
                )
        return out


def _distinct(key: str, names: tuple[str, ...]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"{key} = {shown(names)} names {value_text(twice[0])} twice; name each once."
        )
