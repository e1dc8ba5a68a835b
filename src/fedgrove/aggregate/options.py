"""The rules' own keys (``--option key=value``), and what to say of names and values that are
wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedgrove.ground.errors import AdapterError
from fedgrove.job.kinds import choices, field_kind, join, nearest
from fedgrove.job.toml import parse_value, shown

#: Methods of the catalogue whose server step cannot be done on directories of plain LoRA adapters,
#: and why.
NO_RULE = {
    "local": "its clients share nothing",
    "feddpa-f": "its server averages the clients' global adapters as fedit does; aggregate those "
    "with fedit",
    "feddpa-t": "its server averages the clients' global adapters as fedit does; aggregate those "
    "with fedit",
    "fdlora": "its server averages the clients' global adapters as fedit does; aggregate those "
    "with fedit",
    "pf2lora": "its server averages the clients' shared adapters as fedit does; aggregate those "
    "with fedit",
    "sdflora": "its server recompresses the clients' shared adapters as flexlora does; aggregate "
    "those with flexlora",
    "fedalt": "a client keeps two adapters and a gate that depends on the input, which is no "
    "single PEFT adapter",
    "fedlease": "it averages routers beside the adapters, and a PEFT adapter directory holds none",
    "fed-hello": "each client trains other layers, and a directory does not say which of its "
    "layers were trained",
    "fedra": "each client trains other layers, and a directory does not say which of its layers "
    "were trained",
    "fslora": "it averages changes since the start of the round under random masks, which a "
    "directory does not hold",
    "fedrora": "its factors have unit length and a diagonal of their own, which a PEFT adapter "
    "directory does not hold",
}


class Options(BaseModel):
    """No key at all."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FactorOptions(Options):
    """Means of factors: undefined for unequal scales."""

    rescale: Literal["B"] | None = Field(
        None, description="Unequal scales alpha / r: fold them into B first. Not set: refuse them."
    )


class HetOptions(FactorOptions):
    variant: Literal["full", "reduced"] = Field(
        "full", description="Weight clients by the norm of their update, or (reduced) by --weights."
    )


class FairOptions(FactorOptions):
    lam: float = Field(0.01, ge=0, description="Weight of the correction's norm.")
    lr: float = Field(0.01, gt=0, description="Step size.")
    tol: float = Field(1e-6, ge=0, description="Stop at a smaller gain.")
    max_steps: int = Field(1000, ge=0, description="Most steps.")


class RotOptions(FactorOptions):
    lam: float = Field(0.5, ge=0, le=1, description="Strength of the rotation.")
    round: int | None = Field(
        None,
        ge=1,
        description="Number of this round: odd ones align A, even ones B, the first rotates "
        "nothing. Not set: one more "
        "than that of --previous.",
    )


class TreeOptions(FactorOptions):
    tau: float = Field(0.1, description="Score of leaving a layer whole.")
    K: int = Field(
        3, ge=1, description="A layer may have up to K - 1 groups more than the one above it."
    )
    distance: Literal["frobenius", "cosine"] = Field(
        "frobenius", description="Distance between two clients' B."
    )
    linkage: Literal["average", "complete", "single", "weighted"] = Field(
        "average", description="Of the merge tree."
    )
    fixed_k: int | None = Field(
        None, ge=1, description="So many groups in every layer instead of the search."
    )


class HiOptions(Options):
    k_min: int = Field(2, ge=1, description="Fewest clusters.")
    k_max: int = Field(10, ge=1, description="Most clusters; never more than the clients less one.")
    seed: int = Field(0, ge=0, description="Of the starts of k-means.")
    balanced: bool = Field(False, description="Split the singular values evenly over B and A.")

    @model_validator(mode="after")
    def _agree(self) -> HiOptions:
        if self.k_max < self.k_min:
            raise ValueError(
                f"k_min = {self.k_min} is above k_max = {self.k_max}; lower it, or raise the other"
            )
        return self


def parse_options(given: Sequence[str], model: type[Options], method: str) -> Any:
    """``["K=3", "tau=0.1"]`` as the rule's options. Raises AdapterError in one sentence for the
    first mistake.
    """
    values: dict[str, Any] = {}
    known = list(model.model_fields)
    for text in given:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key or not value:
            raise AdapterError(
                f"--option '{text}' is no setting; write key=value, for example {_example(known)}."
            )
        if key not in known:
            raise AdapterError(f"--option {key}: {method} has no such key; {_meant(key, known)}")
        if key in values:
            raise AdapterError(f"--option {key} is given twice; give it once.")
        values[key] = parse_value(value)
    try:
        return model.model_validate(values, strict=True)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        if item["type"] == "value_error":
            raise AdapterError(f"--option: {item['ctx']['error']}.") from None
        name = str(item["loc"][0])
        field, value = model.model_fields[name], values[name]
        guess = nearest(value, choices(field.annotation)) if isinstance(value, str) else None
        hint = f"; did you mean {name}={guess}?" if guess else "."
        raise AdapterError(
            f"--option {name} must be {field_kind(field)}, not {shown(value)}{hint}"
        ) from None


def parse_weights(text: str | None, count: int) -> list[float] | None:
    """``"120,80"`` as weights in the order of the directories; None is uniform."""
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise AdapterError(
            f"--weights '{text}' must be numbers with commas between them, for example 120,80."
        ) from None
    if len(weights) != count:
        raise AdapterError(
            f"--weights has {len(weights)} numbers for {count} adapters; give one for each, in "
            f"order."
        )
    if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise AdapterError(f"--weights '{text}' must be finite, not negative, and not all zero.")
    return weights


def unknown_method(name: str, rules: Sequence[str]) -> AdapterError:
    if name in NO_RULE:
        return AdapterError(f"{name} has no offline rule: {NO_RULE[name]}.")
    guess = nearest(name, [*rules, *NO_RULE])
    meant = f"did you mean {guess}?" if guess else f"the rules are {join(list(rules), 'and')}."
    return AdapterError(f"The method '{name}' is unknown; {meant}")


def _meant(key: str, known: Sequence[str]) -> str:
    if not known:
        return "it takes none."
    guess = nearest(key, known)
    return f"did you mean {guess}?" if guess else f"its keys are {join(list(known), 'and')}."


def _example(known: Sequence[str]) -> str:
    return {"rescale": "rescale=B", "k_min": "k_min=2"}.get(known[0], "K=3") if known else "K=3"
