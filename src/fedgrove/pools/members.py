"""The members of a pool: finished adapters, of runs or of any PEFT user, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.aggregate.foreign import is_adapter, opened
from fedgrove.federation.tasks import TASKS
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.ground.names import RULE, client_name
from fedgrove.ground.plain import Plain
from fedgrove.ground.toml import value_text
from fedgrove.interop import assembly_file, peft
from fedgrove.interop.copies import content_key
from fedgrove.interop.models import EMBEDDED_MODELS
from fedgrove.pools.signature import Signature, read
from fedgrove.use.result import Result

#: settings of a task that a finished model does not read
_TRAINING = ("class_weights", "generate_examples")


@dataclass(frozen=True)
class Location:
    """Where a member lies, and the run that it is a client of."""

    name: str
    folder: Path
    run: Path | None = None


@dataclass(frozen=True, eq=False)
class PoolMember:
    """One adapter with its head (by the names of its tensors) and its card."""

    place: Location
    adapter: Adapter
    head: dict[str, Tensor]
    card: Plain
    sha256: str  # of adapter and head
    signature: Signature | None = None

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def rank(self) -> int:
        return max(factors.rank for factors in self.adapter.values())

    @property
    def base(self) -> str:
        """The base's name as others know it."""
        name = str(self.card["model"])
        return EMBEDDED_MODELS.get(name, name)


def places(folders: Sequence[str | Path]) -> list[Location]:
    """Runs as their clients that trained, other directories as they are. Raises ``FedgroveError``
    for what is neither, and for one name twice.
    """
    found: list[Location] = []
    for each in map(Path, folders):
        if not each.is_dir():
            raise RunError(f"{each} does not exist; name runs and adapter directories.")
        if (each / "job.toml").exists() or (each / "summary.json").exists():
            found += _of_run(each)
        elif is_adapter(each):
            found.append(Location(_name(each), each))
        else:
            raise AdapterError(
                f"{each / peft.CONFIG} does not exist; {each} is no run and no adapter directory."
            )
    seen: dict[str, Path] = {}
    for place in found:
        if place.name in seen:
            raise AdapterError(
                f"{seen[place.name]} and {place.folder} are both called '{place.name}'; a pool names "
                "its members by their directories: copy one under another name."
            )
        seen[place.name] = place.folder
    return found


def _of_run(run: Path) -> list[Location]:
    result = Result(run)
    names = [name for name, row in result.summary["clients"].items() if not row.get("held_out")]
    return [Location(name, result.client(name).path, run) for name in names]


def _name(folder: Path) -> str:
    name = folder.resolve().name
    if client_name(name) != name:
        raise AdapterError(f"{folder}: a member cannot be called '{name}'; use {RULE}.")
    return name


def members(found: Sequence[Location], base: str | None = None) -> list[PoolMember]:
    """The members of these places, one base for all; ``base`` names it where they call it
    differently. Raises ``AdapterError`` in one sentence.
    """
    if not found:
        raise AdapterError("There is no member; name runs or adapter directories.")
    read_ = [_member(place, base) for place in found]
    seen: dict[str, PoolMember] = {}
    for each in read_:
        check_alike(read_[0], each)
        if each.sha256 in seen:
            raise AdapterError(
                f"{seen[each.sha256].place.folder} and {each.place.folder} are the same adapter, "
                "between which there is nothing to choose; leave one out."
            )
        seen[each.sha256] = each
    return read_


def _member(place: Location, base: str | None) -> PoolMember:
    folder = place.folder
    if (folder / assembly_file.FILE).exists():
        card = peft.read_json(folder / peft.CARD)
        raise AdapterError(f"{folder} is no plain LoRA adapter: {card.get('why', 'a pool')}")
    if (folder / peft.CONFIG).exists() and peft.read_json(folder / peft.CONFIG).get("use_dora"):
        raise AdapterError(
            f"{folder / peft.CONFIG} has use_dora set: DoRA scales whole layers, so no pool can add "
            f"it to others; leave it out."
        )
    found = opened(folder, base=base)
    if found.card.get("merged") or not found.adapter:
        raise AdapterError(f"{folder} holds a merged model; a pool takes adapters.")
    tensors: dict[str, Tensor] = dict(found.head)
    scales = []
    for site, factors in found.adapter.items():
        tensors |= {f"{site}.A": factors.A, f"{site}.B": factors.B}
        scales.append((site, factors.scale))
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"{folder}: '{name}' holds NaN or Inf; leave this member out.")
    signature = read(folder)
    member = PoolMember(
        place,
        found.adapter,
        dict(found.head),
        found.card,
        content_key(tensors, sorted(scales)),
        signature,
    )
    if signature is not None and not same_base(signature.base, member.base):
        raise AdapterError(
            f"{folder}: its signature is of features of '{signature.base}', not of '{member.base}'; "
            "sign it again."
        )
    return member


def check_alike(first: PoolMember, other: PoolMember) -> None:
    """Refuse another base, revision, task, kind of head, or other labels."""
    where, there = other.place.folder, first.place.folder
    if not same_base(first.base, other.base):
        raise AdapterError(
            f"{where} is an adapter of '{other.base}', but {there} of '{first.base}'; a pool has one "
            "base: leave one out, or name it with --base where it is one under two names."
        )
    for key, what in (("revision", "revision of the base"), ("task", "task"), ("head", "head")):
        ours, theirs = first.card.get(key), other.card.get(key)
        if ours != theirs:
            raise AdapterError(
                f"{where}: its {what} is {theirs!r}, but {ours!r} in {there}; leave one out."
            )
    mine, own = _settings(first), _settings(other)
    for key in sorted(mine.keys() | own.keys()):
        if mine.get(key) != own.get(key):
            raise AdapterError(
                f"{where}: its {key} is {value_text(own.get(key))}, but {value_text(mine.get(key))} in "
                f"{there}; a pool reads all answers in one way: leave one out."
            )
    ours, theirs = first.card["labels"], other.card["labels"]
    if sorted(ours) != sorted(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        raise AdapterError(
            f"{where}: its labels are {_listed(theirs)}, but {_listed(ours)} in {there} (only one has "
            f"{_listed(odd)}); a pool answers with the labels of all."
        )


def _settings(member: PoolMember) -> Plain:
    """What a member's task says of how answers are read."""
    task = TASKS.find(member.card["task"]).from_card(member.card)
    aside = {"labels", *_TRAINING, *task.tokens}
    return {key: value for key, value in task.card().items() if key not in aside}


def same_base(one: str, other: str) -> bool:
    """One model may lie under several paths: then the last part tells."""
    return Path(one.rstrip("/")).name == Path(other.rstrip("/")).name


def matched(member: PoolMember, labels: Sequence[str]) -> Mapping[str, Tensor]:
    """The member's head, weight [c, h] and bias [c], with its outputs in the order of ``labels``;
    a base's own head, tensors [any shape], where it needs no new order.
    """
    own = list(member.card["labels"])
    if own == list(labels) or not member.head:
        return member.head
    if set(member.head) != {"weight", "bias"}:
        raise AdapterError(
            f"{member.place.folder}: its labels are in the order {_listed(own)}, not "
            f"{_listed(labels)}, and its head is the base's own, whose outputs cannot be matched."
        )
    order = torch.tensor([own.index(label) for label in labels])
    return {name: value[order] for name, value in member.head.items()}


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels)) or "none"
