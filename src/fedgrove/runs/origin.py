"""The adapter that a run starts from (``model.adapter``): read, checked, and folded into the base.

Clients then train on a base that has it in its weights. What leaves them is an adapter on the
original base: ``appended`` puts the start behind what was trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.algebra import concat
from fedgrove.aggregate.foreign import Opened, opened
from fedgrove.ground.errors import AdapterError, JobError
from fedgrove.interop import assembly_file, peft
from fedgrove.interop.models import Base

if TYPE_CHECKING:
    from fedgrove.job import Job

_FILES = (peft.CONFIG, peft.WEIGHTS, peft.HEAD, peft.CARD)


def digest_of(job: Job) -> str | None:
    """SHA-256 of the start's files, so that a run that goes on has the start that it had; None
    where there is no start. Raises ``JobError``.
    """
    if job.model.adapter is None:
        return None
    folder = _folder(job)
    digest = hashlib.sha256()
    for name in _FILES:
        if (folder / name).exists():
            content = (folder / name).read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def started(job: Job, base: Base, drawn: Mapping[str, Tensor]) -> Base:
    """The base with the job's start folded into its weights, in place. Raises ``JobError`` where it
    is none for this base, or has a head of other labels.

    ``drawn``: the head that a run without a start begins with, tensors [any shape] by name, whose
    names and shapes the start's are to have.
    """
    if job.model.adapter is None:
        return base
    folder = _folder(job)
    found = _opened(job, folder)
    known = job.model.adapter_digest
    if known is not None and digest_of(job) != known:
        raise _refused(job, "its files changed since the run was begun; bring them back")
    _check_base(job, base, folder)
    start: Adapter = {}
    for site, factors in found.adapter.items():
        name, layer = _layer(job, base, site)
        shape = (factors.B.shape[0], factors.A.shape[1])
        held = tuple(_as_linear(layer).shape)
        if held != shape:
            raise _refused(
                job,
                f"its update of '{site}' is {list(shape)}, but that layer of {base.name} is "
                f"{list(held)}; it is an adapter of another base",
            )
        start[name] = factors.map(lambda tensor: tensor.to(base.adapter_dtype))
    head = _head(job, base, found, drawn)
    for name, factors in start.items():
        _fold(_as_linear(base.model.get_submodule(name)), factors)
    return replace(base, start=start, start_head=head)


def appended(whole: Adapter, start: Adapter, before: int = 0) -> Adapter:
    """Both updates as one adapter: at each site the modules of ``whole``, then those of ``start``.

    A site that the start alone has gets ``before`` modules of zeros in front, so that slices of the
    first modules mean the same at all sites.
    """
    if not start:
        return whole
    alone = {site: begun for site, begun in start.items() if site not in whole}
    empty = {site: begun.zeros(before, 1.0) for site, begun in alone.items() if before}
    return concat([{**whole, **empty}, start])


def _folder(job: Job) -> Path:
    folder = Path(str(job.model.adapter))
    if not folder.is_dir():
        raise _refused(job, "there is no such directory")
    if (folder / "job.toml").exists():
        raise _refused(job, f"it is a run; name one of its adapters, as {folder}/adapters/CLIENT")
    return folder


def _opened(job: Job, folder: Path) -> Opened:
    if (folder / assembly_file.FILE).exists():
        why = peft.read_json(folder / peft.CARD).get("why", "it is no PEFT adapter")
        raise _refused(job, f"it cannot be folded into a base: {why}")
    if not (folder / peft.CONFIG).exists():
        raise _refused(
            job, f"it has no {peft.CONFIG}, so it is no adapter; a whole model is a model.name"
        )
    if peft.read_json(folder / peft.CONFIG).get("use_dora"):
        raise _refused(
            job, "it is a DoRA adapter, which no plain adapter on the original base continues"
        )
    try:
        return opened(folder, base=job.model.name)
    except AdapterError as error:
        raise _refused(job, str(error)) from error


def _check_base(job: Job, base: Base, folder: Path) -> None:
    """The same base may lie under another path: then the last part of its name tells."""
    named = peft.read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if not named:
        return
    known = {Path(name).name for name in (base.name, base.upstream)}
    if Path(str(named)).name not in known:
        raise _refused(job, f"it is an adapter of {named}, and model.name is {base.name}")


def _layer(job: Job, base: Base, site: str) -> tuple[str, nn.Module]:
    """The linear layer that the start calls ``site``, by its name in this base: with the prefix of
    a whole classifier, or without.
    """
    prefix = f"{base.model.base_model_prefix}."
    modules = dict(base.model.named_modules())
    for name in (site, prefix + site, site.removeprefix(prefix)):
        layer = modules.get(name)
        if isinstance(layer, nn.Linear | Conv1D):
            if layer.weight is base.model.get_input_embeddings().weight:
                raise _refused(
                    job, f"its '{site}' shares its weights with the input embedding of {base.name}"
                )
            return name, layer
    raise _refused(
        job, f"{base.name} has no linear layer '{site}'; it is an adapter of another base"
    )


def _head(job: Job, base: Base, found: Opened, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The start's head, in the shapes [any] of ``drawn``; {} where it has none."""
    if not found.head:
        return {}
    kind, labels = found.card["head"], list(found.card["labels"])
    if kind != base.head:
        raise _refused(
            job, f'its head is "{kind}", and this job\'s is "{base.head}" (model.head, data.task)'
        )
    if labels != list(job.data.classes):
        raise _refused(
            job,
            f"its head is for the labels {labels}, and the job has {list(job.data.classes)}; where "
            f"they are the same in this order, say so in its {peft.CARD} (labels), else give it "
            "without its head",
        )
    shapes = {name: tuple(value.shape) for name, value in drawn.items()}
    if {name: tuple(value.shape) for name, value in found.head.items()} != shapes:
        raise _refused(job, "its head has other shapes than the one of this job")
    return {name: value.to(drawn[name].dtype) for name, value in found.head.items()}


@torch.no_grad()
def _as_linear(layer: nn.Module) -> Tensor:
    """The layer's weight, or a view of it, as [out, in]; a Conv1D holds it as [in, out]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, Conv1D):
        return weight.T
    return weight


def _fold(weight: Tensor, factors: Factors) -> None:
    """Add the update to ``weight [out, in]``, in float64."""
    update = factors.map(lambda tensor: tensor.to(weight.device, torch.float64)).product()
    weight.copy_((weight.double() + update).to(weight.dtype))


def _refused(job: Job, why: str) -> JobError:
    return JobError(f"model.adapter = '{job.model.adapter}': {why}.")
