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
    Field,
    SkipValidation,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from fedgrove.ground.marks import Automatic, Chooser, InsteadOf, Of, marks_of
from fedgrove.ground.options import Options, Share, Text, Texts, distinct
from fedgrove.ground.plain import Given
from fedgrove.job.kinds import join, nearest
from fedgrove.job.toml import shown, value_text


class Section(Options):
    """A table of the job: immutable, no unknown keys, no silent conversion of one type into
    another.
    """

    @classmethod
    def kind_for(cls, values: Given) -> type[Section]:
        """The class that has all keys of a table with these values, where some of them choose
        others.
        """
        return cls

    @classmethod
    def offered(cls) -> dict[str, FieldInfo]:
        """Every key that a table of this section may have, whatever is chosen."""
        return dict(cls.model_fields)

    @classmethod
    def ordered(cls) -> list[str]:
        """Its keys in the order in which they are written."""
        return list(cls.model_fields)

    @classmethod
    def dropped(
        cls,
        values: Given,
        key: str,
        after: Any,
    ) -> list[str]:
        """The keys of a table with these values that another choice of ``key`` drops: what is
        ``Of`` it, and what only the old choice knows.
        """
        return [
            name
            for name in values
            if name not in cls.model_fields or Of(key) in marks_of(cls.model_fields[name], Of)
        ]

    @classmethod
    def others(cls) -> dict[str, tuple[FieldInfo, str]]:
        """The keys that it would have with other choices, each with that choice in words."""
        return {}


Rank = Annotated[int, Field(ge=1)]
AutoCount = Literal["auto"] | Annotated[int, Field(ge=1)]
Evaluate = Literal["all", "sample"] | Annotated[int, Field(ge=1)]


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
    adapter: Annotated[Text | None, Chooser()] = Field(
        None,
        description="Directory of a LoRA adapter of this model that the run starts from: it is part "
        "of the frozen base while clients train, and of every adapter that leaves. Not set: the "
        "model as it is.",
        examples=["runs/fedit/adapters/_global"],
    )
    adapter_digest: Annotated[Text | None, Automatic("data"), Of("adapter")] = Field(
        None,
        description="SHA-256 of that adapter's files, written at the start: a run that goes on must "
        "see the same.",
        examples=["0" * 64],
    )

    @model_validator(mode="after")
    def _agree(self) -> ModelSection:
        if self.quantize != "none" and self.head == "stock":
            raise ValueError(
                f"model.quantize = {value_text(self.quantize)} would round the stock head, which "
                f"is trained; set "
                'model.head = "pooled", or leave model.quantize out.'
            )
        if self.quantize != "none" and self.adapter is not None:
            raise ValueError(
                f"model.adapter cannot be folded into a base of rounded weights (model.quantize = "
                f"{value_text(self.quantize)}); leave one of them out."
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
        None,
        description="Numerator of the scale. Not set: 2 R.",
        examples=[16.0],
    )
    scaling: Literal["global", "client"] = Field(
        "global",
        description="The scale of a client of rank r: alpha / R for every client, or alpha / r for "
        "each.",
    )
    rslora: bool = Field(
        False,
        description="Divide alpha by the square root of the rank instead of the rank (rsLoRA), so "
        "that updates of a large rank do not shrink.",
    )
    dora: bool = Field(
        False,
        description="Train a magnitude for every output beside A and B (DoRA); for the methods "
        "whose server takes the mean of each tensor, or none: fedit, ffa-lora, fedsa-lora, fedvlm, local.",
    )
    dropout: Share = Field(0.0, description="Dropout on the input of each adapter while training.")
    targets: Literal["auto", "all-linear"] | Texts = Field(
        "auto",
        description="Adapted linear layers. auto: query and value of every attention layer, or what "
        "PEFT takes for the model's type (their fused layer); all-linear: every one of the "
        "transformer's layers; or patterns for module paths "
        '(a whole path, its last parts, or with * and ?), for example ["query", "*.dense"].',
    )

    @property
    def named_targets(self) -> tuple[str, ...]:
        """What ``targets`` says, word by word."""
        if isinstance(self.targets, str):
            return (self.targets,)
        return self.targets


class FederationSection(Section):
    """The clients, their budgets, and who takes part."""

    clients: int = Field(
        16,
        ge=1,
        description='How many clients a data set is split into ("natural" splits and silos have '
        "their own).",
    )
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the clients that train in each round, drawn anew.",
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
            distinct("federation.held_out", self.held_out)
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
        if isinstance(given, BaseModel):
            own = given.model_dump()
        else:
            own = {}
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


_POOLED = (
    "all rows on one machine are a yardstick, a row of `fedgrove compare --methods fedit,pooled`, and "
    'no way to run a federation; for such a model alone put all rows into one silo and choose "local"'
)
_AT_THE_SERVER = (
    'there is no optimiser at the server; FedAvg of adapters is "fedit", and its clients train with '
    "AdamW (train.optimizer)"
)
#: what other tools call a method, or a yardstick, and what there is instead; without signs between
NOT_METHODS = {
    "fedavg": 'FedAvg of adapters is "fedit"',
    "fedprox": 'there is no proximal term; FedAvg of adapters is "fedit", and "local", "fedsa-lora" '
    'or "feddpa-f" are for clients that differ',
    "scaffold": 'there are no control variates; FedAvg of adapters is "fedit", and "lora-fair" or '
    '"fedex-lora" correct what its mean loses',
    "fedadam": _AT_THE_SERVER,
    "fedyogi": _AT_THE_SERVER,
    "fedadagrad": _AT_THE_SERVER,
    "fedavgm": _AT_THE_SERVER,
    "fedopt": _AT_THE_SERVER,
    "centralized": _POOLED,
    "centralised": _POOLED,
    "pooled": _POOLED,
    "oracle": _POOLED,
}


def options_of(name: str) -> type[BaseModel]:
    """The model of a method's own keys. This may import the methods, and with them torch."""
    from fedgrove.methods import registry

    known = registry.names()
    elsewhere = re.sub(r"[-_ ]", "", name).lower()
    if name not in known and elsewhere in NOT_METHODS:
        raise ValueError(f"method.name = {shown(name)} is no method: {NOT_METHODS[elsewhere]}.")
    if name not in known:
        guess = nearest(name, known)
        if guess:
            meant = f"did you mean {value_text(guess)}? There"
        else:
            meant = "there"
        raise ValueError(
            f"method.name = {shown(name)} is no method; {meant} are {join(known, 'and')}."
        )
    return registry.options_of(name)


class TrainSection(Section):
    """What a client does in a round, and on what device."""

    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw",
        description="The optimiser; its state starts anew each round.",
    )
    lr: float = Field(1e-3, gt=0, description="Learning rate of the adapters.")
    head_lr: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Learning rate of the classifier's head. Not set: that of the adapters.",
        examples=[1e-3],
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="Decoupled weight decay (AdamW), or L2 (SGD).",
    )
    momentum: Share = Field(0.0, description="Momentum of SGD.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="The learning rate over a client's steps of one round.",
    )
    warmup_fraction: Share = Field(
        0.0,
        description="Share of those steps in which the learning rate rises from zero.",
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
        False,
        description="Recompute activations: less memory, more time.",
    )
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Automatic("machine")] = Field(
        "auto",
        description="auto: the best that there is.",
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Automatic("machine")] = Field(
        "auto",
        description="Precision of the frozen base; adapters are float32. auto: bfloat16 where that "
        "is faster.",
    )
    threads: Annotated[AutoCount, Automatic("machine")] = Field(
        "auto",
        description="CPU threads; auto: one for each core that the process may use.",
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
        1,
        ge=1,
        description="Rounds between evaluations; the last round is always evaluated.",
    )
    evaluate: Evaluate = Field(
        "all",
        description="Which clients an evaluation measures, the last one and the export at the end "
        "too: all; sample: 100 of them; or so many. Drawn anew by the seed for each round; the others train "
        "and leave with an adapter as ever.",
        examples=["sample", 500],
    )
    checkpoint_every: int = Field(
        1,
        ge=1,
        description="Rounds between checkpoints, which --resume starts from.",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="Whose models the clients leave with: those of the last round, or of the "
        "evaluated round with the best mean metric over the clients, on their validation rows "
        "(data.validation_fraction), else on their test rows, which makes the figures optimistic.",
    )
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Stop after so many evaluations without a better one, measured as in run.keep. "
        "Not set: all rounds.",
        examples=[3],
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

    @model_validator(mode="after")
    def _comparable(self) -> RunSection:
        compares = self.keep == "best" or self.patience is not None
        if compares and self.evaluate != "all":
            raise ValueError(
                f"run.evaluate = {self.evaluate!r} measures other clients in each round, and "
                'run.keep = "best" and run.patience compare rounds; set it to "all", or leave '
                "them out."
            )
        return self

    @field_validator("out")
    @classmethod
    def _places(cls, out: str) -> str:
        for place in re.findall(r"\{(.*?)\}", out):
            if place not in ("method", "seed"):
                raise ValueError(
                    f"{{{place}}} stands for nothing; only {{method}} and {{seed}} do."
                )
        return out
