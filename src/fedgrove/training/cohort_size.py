"""How many clients share a batch: ``train.cohort = "auto"``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedgrove.federation.tasks import task_of
from fedgrove.training.readers import READERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fedgrove.interop.models import Base
    from fedgrove.job import Job
    from fedgrove.methods.contract import Setting


def cohort_size(
    job: Job,
    base: Base,
    setting: Setting,
    clients: int,
    lanes: int = 1,
) -> int:
    """``train.cohort = "auto"``: for the base's shape, the job's batch, and ``train.memory``; of
    each lane.
    """
    if not row_by_row(base):
        return 1
    config = base.model.config
    layers = int(getattr(config, "num_hidden_layers", len(base.layers)))
    heads = getattr(config, "num_attention_heads", 1)
    longest = _patches(config) or _longest_text(job)
    # kept for the backward pass at each layer: about 16 vectors of the hidden size, and scores and
    # weights of attention
    kept = 16 * base.hidden + 2 * heads * longest
    logits = READERS[base.head].token_bytes(base)
    sides = sum(site.in_features + site.out_features for site in base.sites.values())
    factors = setting.rank * sides
    matrices = 12 * layers * base.hidden**2
    a_lanes = math.ceil(clients / lanes)
    memory = memory_for(job.train.memory, base.device)
    return size_for(
        device=base.device.type,
        batch_size=job.train.batch_size,
        # 1 would be read as "one after the other"
        clients=max(a_lanes, min(clients, 2)),
        tokens=job.train.batch_size * longest * task_of(job.data).rows_each,
        token_bytes=layers * kept * base.dtype.itemsize + logits,
        client_bytes=4 * factors * base.adapter_dtype.itemsize,
        # every member's tokens run through every member's factors: no more of them than a quarter
        # of the base
        share=4 * factors / matrices,
        memory=memory // lanes,
        lanes=lanes,
    )


def _longest_text(job: Job) -> int:
    """The most tokens of an example, of the task's longest part."""
    tokens = task_of(job.data).tokens
    return max(tokens.values(), default=1)


def row_by_row(base: Base) -> bool:
    """Whether an example stays a row of its batch: the windows of models with stages (Swin) do
    not.
    """
    heads = getattr(base.model.config, "num_attention_heads", 1)
    return isinstance(heads, int)


def _patches(config: PretrainedConfig) -> int | None:
    """How many tokens an image is to a vision transformer, its class token among them."""
    side = getattr(config, "image_size", None)
    patch = getattr(config, "patch_size", None)
    if not isinstance(side, int) or not isinstance(patch, int):
        return None
    each_way = side // patch
    return each_way**2 + 1


def memory_for(wanted: str, device: torch.device) -> int:
    """``train.memory`` in bytes; "auto" is half of what is free on the device."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if wanted.endswith(unit):
            number = float(wanted.removesuffix(unit))
            return int(number * size)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) // 2
    return _available() // 2


def _available() -> int:
    """What the system can give, in bytes."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        rows = text.splitlines()
        available = next(row for row in rows if row.startswith("MemAvailable"))
        kilobytes = available.split()[1]
        return int(kilobytes) * 1024
    except (OSError, StopIteration, ValueError):
        return 4 * 10**9  # a system that does not say


def size_for(
    *,
    device: str,
    batch_size: int,
    clients: int,
    tokens: int,
    token_bytes: int,
    client_bytes: int,
    share: float,
    memory: int,
    lanes: int = 1,
) -> int:
    """How many clients share a batch: as many as keep the device busy, within ``memory`` bytes.

    ``tokens`` of one client's batch at most, ``token_bytes`` of activations for each,
    ``client_bytes`` for a client's adapter with gradients and optimiser state, ``share`` what it
    takes of the products that all members' factors may cost. A CPU is busy with about 128 examples
    in all its lanes, of at most 16 clients in each; a GPU with about 256.
    """
    busy = 128
    most = min(clients, 16)
    if device == "cuda":
        busy = 256
        most = clients
    enough = math.ceil(busy / lanes / batch_size)
    client = tokens * token_bytes + client_bytes
    fits = memory // max(1, client)
    affordable = int(1 / share)
    return max(1, min(enough, most, fits, affordable))
