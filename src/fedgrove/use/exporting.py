"""An adapter directory written elsewhere: whole, one tier, of a smaller rank, or merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from fedgrove.ground.errors import RunError
from fedgrove.interop import assembly_file, peft
from fedgrove.interop.models import EMBEDDED_MODELS


def export(
    source: Path,
    out: Path,
    base: str | None = None,
    *,
    merge: bool = False,
    tier: str | None = None,
    rank: int | None = None,
) -> Path:
    """Write the adapter directory ``source`` to the new directory ``out``; ``base`` names its base
    model anew. The options are those of ``OneModel.export``. Raises ``RunError``.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; name a new directory.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        place = Path(folder)
        # the name of a directory is its adapter's in messages
        source = _ours(source, place / "ours" / source.absolute().name, base)
        if tier is not None:
            from fedgrove.interop.tiers import write_tier

            whole, source = source, place / "tier" / source.name
            write_tier(whole, source, tier)
        if rank is not None:
            from fedgrove.interop.shrink import write_truncated

            whole, source = source, place / "rank" / source.name
            write_truncated(whole, source, rank)
        if merge:
            from fedgrove.use.personal import merge as write

            write(source, out)
        else:
            shutil.copytree(source, out, dirs_exist_ok=True)
    return out


def _ours(source: Path, out: Path, base: str | None) -> Path:
    """``source`` where it is a directory of ours, else ``out``, where it is written as ours are."""
    from fedgrove.use.foreign import is_adapter, tidied

    if not is_adapter(source):
        raise RunError(f"{source} is not an adapter directory; it has no {peft.CONFIG}.")
    card = {}
    if (source / peft.CARD).exists():
        card = peft.read_json(source / peft.CARD)
    if card.get("merged"):
        raise RunError(
            f"{source} is a whole model already, its adapter merged into it; copy the directory."
        )
    if not card.get("head"):
        return tidied(source, out, base)
    if base is None:
        return source
    shutil.copytree(source, out)
    _rename(out / peft.CARD, {"model": base, "revision": None})
    if not (source / assembly_file.FILE).exists():
        upstream = EMBEDDED_MODELS.get(base, base)
        _rename(out / peft.CONFIG, {"base_model_name_or_path": upstream, "revision": None})
    return out


def _rename(file: Path, values: dict[str, str | None]) -> None:
    content = peft.read_json(file) | values
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
