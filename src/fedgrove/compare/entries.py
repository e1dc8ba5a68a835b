"""What a comparison is asked for on the command line: methods with their own options, seeds, and
values to tune.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedgrove.ground.errors import JobError
from fedgrove.job import LoraSection, TrainSection
from fedgrove.job.kinds import join
from fedgrove.job.toml import parse_value, value_text

#: The numbers that a method may be tuned in, by short name. What is missing from [train] and [lora]
#: is the budget (or the machine), and what is missing altogether is the clients and their data: all
#: methods share those.
TUNABLE = {
    **{
        key: f"train.{key}"
        for key in ("lr", "head_lr", "weight_decay", "momentum", "warmup_fraction", "clip")
    },
    **{key: f"lora.{key}" for key in ("alpha", "dropout")},
}


POOLED = "pooled"  # an entry that is no method: ``engines.pooled``


@dataclass(frozen=True)
class Entry:
    """One row of the comparison: a method, its own options, and what it is called."""

    label: str
    method: str
    options: tuple[str, ...] = ()  # "fixed_k=2"

    @property
    def slug(self) -> str:
        """The label as a directory's name."""
        return re.sub(r"[^A-Za-z0-9_.=+-]+", "-", self.label).strip("-.") or "entry"

    @property
    def settings(self) -> list[str]:
        if self.pooled:
            return []
        return [f"method.name={self.method}", *(f"method.{option}" for option in self.options)]

    @property
    def pooled(self) -> bool:
        """Whether this is no method, but all rows on one machine (``engines.pooled``)."""
        return self.method == POOLED


@dataclass(frozen=True)
class Knob:
    """One key to tune, and the values that every method tries."""

    short: str
    key: str
    values: tuple[int | float, ...]


_BUDGET = {*TrainSection.model_fields, *LoraSection.model_fields, "rounds", "seed"}

Trial = tuple[tuple[str, int | float], ...]  # ((dotted key, value), ...)


def parse_methods(texts: str | Iterable[str]) -> list[Entry]:
    """``fedit, fedtreelora[fixed_k=2], no tree: fedtreelora[tree=false]`` as entries, in that
    order.

    Raises ``JobError`` for a broken entry and for two of one label. Whether methods and options
    exist, the job checks.
    """
    if isinstance(texts, str):
        parts = _split(texts)
    else:
        parts = list(texts)
    entries = [_entry(part) for part in parts]
    if not entries:
        raise JobError(
            "--methods names no method; give one or more, for example --methods fedit,hilora."
        )
    seen: dict[str, Entry] = {}
    for entry in entries:
        twin = seen.setdefault(entry.slug.casefold(), entry)
        if twin is not entry:
            if twin.label == entry.label:
                which = f"'{entry.label}' twice"
            else:
                which = f"'{twin.label}' and '{entry.label}'"
            raise JobError(
                f"--methods has {which}, whose runs would share a directory; leave one out, or "
                f"name it: "
                f"second: {entry.label}."
            )
    return entries


def parse_seeds(text: str | Iterable[int]) -> list[int]:
    """``0,1,2``: whole numbers of at least 0, each once."""
    if isinstance(text, str):
        given = [part.strip() for part in text.split(",")]
    else:
        given = [str(seed) for seed in text]
    wrong = [part for part in given if not (part.isascii() and part.isdigit())]
    if wrong or not given:
        raise JobError(
            f"--seeds has '{wrong[0] if wrong else ''}', which is no whole number of at least 0; "
            f"write 0,1,2."
        )
    seeds = [int(part) for part in given]
    twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if twice is not None:
        raise JobError(f"--seeds has {twice} twice; give each seed once.")
    return seeds


def parse_tune(texts: Sequence[str]) -> list[Knob]:
    """``lr=1e-4,3e-4`` or ``lora.alpha=8,16``; several of them are tried in all combinations."""
    knobs = [_knob(text) for text in texts]
    for index, knob in enumerate(knobs):
        if any(knob.key == other.key for other in knobs[:index]):
            raise JobError(f"--tune gives {knob.key} twice; write all its values after one --tune.")
    return knobs


def trials(knobs: Sequence[Knob]) -> list[Trial]:
    """Every combination of the values; none where there is nothing to tune."""
    if not knobs:
        return []
    keys = [knob.key for knob in knobs]
    combinations = itertools.product(*(knob.values for knob in knobs))
    return [tuple(zip(keys, values, strict=True)) for values in combinations]


def trial_name(trial: Trial) -> str:
    """``lr=0.0003``; also the name of its directory."""
    parts = []
    for key, value in trial:
        short = key.removeprefix("train.")
        parts.append(f"{short}={value_text(value)}")
    return ",".join(parts)


def _entry(text: str) -> Entry:
    match = re.fullmatch(
        r"\s*(?:(?P<label>[^\[\]:]+):)?\s*(?P<method>[^\[\]:\s]+)\s*(?:\[(?P<own>.*)\])?\s*",
        text,
        re.S,
    )
    if not match:
        raise JobError(
            f"--methods has '{text.strip()}', which is no method; write a name, or a name with its "
            f"own options such as "
            "fedtreelora[fixed_k=2]."
        )
    method, own = match["method"], [part.strip() for part in _split(match["own"] or "")]
    for option in own:
        key, equals, value = option.partition("=")
        if not equals or not value.strip() or not re.fullmatch(r"[A-Za-z_]\w*", key.strip()):
            raise JobError(
                f"--methods has '{option}' in {text.strip()}, which sets no option of a method; "
                f"write key=value, for "
                "example fedtreelora[fixed_k=2] (what all methods share goes into --set)."
            )
    options = tuple("=".join(part.strip() for part in option.split("=", 1)) for option in own)
    if any(option.startswith("name=") for option in options):
        raise JobError(
            f"--methods has 'name' as an option in {text.strip()}; the method's name stands before "
            f"the bracket."
        )
    if method == POOLED and options:
        raise JobError(
            f"--methods has {text.strip()}, but {POOLED} is all rows on one machine, which has no "
            "options; leave them out."
        )
    label = (match["label"] or "").strip() or (
        f"{method}[{', '.join(options)}]" if options else method
    )
    return Entry(label, method, options)


def _knob(text: str) -> Knob:
    short, equals, values = text.partition("=")
    short = short.strip()
    if not equals or not short:
        raise JobError(
            f"--tune has '{text}', which is no key with values; write for example --tune "
            f"lr=1e-4,3e-4,1e-3."
        )
    key = _tunable(short)
    parsed = [parse_value(value.strip()) for value in values.split(",") if value.strip()]
    for value in parsed:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise JobError(
                f"--tune {short} has {value_text(value)}, which is no number; only numbers can be "
                f"tuned."
            )
    if len(set(parsed)) < 2 or len(set(parsed)) < len(parsed):
        raise JobError(
            f"--tune {short} needs two or more different values, not {values.strip() or 'none'}; "
            f"a single one goes into --set {key}=VALUE."
        )
    return Knob(short, key, tuple(parsed))


def _tunable(short: str) -> str:
    """The dotted key; raises ``JobError`` for one that would not mean the same for all methods, or
    is none.
    """
    section, _, name = short.rpartition(".")
    if short in TUNABLE or short in TUNABLE.values():
        return TUNABLE.get(short, short)
    if section == "method":
        # Not every method has it, and each is to have the same trials.
        why = f"is a method's own key; compare its values side by side: NAME[{name}=...] in --methods."
    elif section.split(".")[0] in ("data", "federation", "model", "run") or name in _BUDGET:
        why = (
            "is not for tuning, because all methods share the clients, the data, the model and the "
            "budget; set it for "
            f"all with --set, or tune {join(list(TUNABLE))}."
        )
    else:
        why = f"is no key that can be tuned; there are {join(list(TUNABLE), 'and')}."
    raise JobError(f"--tune {short}: {short} {why}")


def _split(text: str) -> list[str]:
    """At the commas that stand outside of brackets and quotes; empty parts are left out."""
    return [part.strip() for part in _parts(text) if part.strip()]


def _parts(text: str) -> Iterator[str]:
    depth, quote, start = 0, "", 0
    for index, letter in enumerate(text):
        if quote:
            if letter == quote:
                quote = ""
            else:
                quote = quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]
