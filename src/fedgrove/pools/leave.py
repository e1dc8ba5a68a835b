"""A pool as others can use it: a member as its own PEFT directory, or the one adapter that computes
the whole, where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from fedgrove.adapters.adapter import Adapter
from fedgrove.adapters.assembly import as_one_adapter
from fedgrove.adapters.lowrank import lean
from fedgrove.adapters.private import unseal
from fedgrove.ground.errors import AdapterError
from fedgrove.interop import peft
from fedgrove.methods.head import PREFIX
from fedgrove.pools import build
from fedgrove.pools.pool import Pool, refuse_used
from fedgrove.use.personal import merge as merged


def export_member(
    pool: Pool,
    name: str,
    out: Path,
    *,
    merge: bool = False,
) -> Path:
    """One member, its outputs in the order of the pool's labels."""
    heads = build.heads_of(pool.members, pool.fallback)
    for each, head in zip(pool.members, heads, strict=True):
        if each.name == name:
            return write(pool, each.adapter, head, out, client=name, merge=merge)
    raise AdapterError(f"The pool has no member '{name}'; it has {', '.join(pool.names)}.")


def export_whole(
    pool: Pool,
    out: Path,
    *,
    merge: bool = False,
) -> Path:
    """The one adapter that computes the pool. Raises ``AdapterError`` where its router chooses anew
    for each input.
    """
    if not pool.assembly.mix.linear:
        raise AdapterError(pool.why())
    adapter = lean(as_one_adapter(pool.assembly, pool.kernel.base.sites))
    head = {
        name.removeprefix(PREFIX): unseal(extra.value)
        for name, extra in pool.assembly.extras.items()
        if name.startswith(PREFIX)
    }
    return write(pool, adapter, head, out, client=None, merge=merge)


def write(
    pool: Pool,
    adapter: Adapter,
    head: Mapping[str, Tensor],
    out: Path,
    *,
    client: str | None,
    merge: bool = False,
) -> Path:
    """A PEFT directory on the pool's base, or the whole model; ``head``: tensors [any shape] by name."""
    refuse_used(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    base = pool.kernel.base
    card = {**pool.card, "method": None, "client": client}
    with TemporaryDirectory() as folder:
        place = out
        if merge:
            place = Path(folder) / "adapter"
        peft.save_adapter(
            place,
            adapter,
            base=base.upstream,
            head={name: value.float() for name, value in head.items()},
            head_kind=base.head,
            head_modules=base.head_modules,
            card=card,
        )
        if merge:
            merged(place, out)
    return out
