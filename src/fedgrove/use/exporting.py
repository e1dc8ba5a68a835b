"""An adapter directory written elsewhere: whole, one tier, of a smaller rank, or merged."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from fedgrove.ground.errors import RunError
from fedgrove.interop import assembly_file, peft
from fedgrove.interop.models import EMBEDDED_MODELS

FORMATS = ("peft", "gguf", "vllm")


def export(
    source: Path,
    out: Path,
    base: str | None = None,
    *,
    merge: bool = False,
    tier: str | None = None,
    rank: int | None = None,
    to: str = "peft",
) -> list[str]:
    """Write the adapter directory ``source`` to the new directory ``out`` (a file with ``to =
    "gguf"``); ``base`` names its base model anew. The options are those of ``OneModel.export``.
    Returns what the user should know. Raises ``RunError``.
    """
    said = []
    _check(out, to, merge=merge)
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
            said.append(write_truncated(whole, source, rank).words())
        if to == "gguf":
            from fedgrove.interop.gguf_adapter import write_gguf

            write_gguf(source, out)
        elif to == "vllm":
            from fedgrove.interop.vllm_adapter import write_even

            needed = write_even(source, out)
            said.append(f"vLLM loads it with max_lora_rank = {needed} or more.")
        elif merge:
            from fedgrove.use.personal import merge as write

            write(source, out)
        else:
            shutil.copytree(source, out, dirs_exist_ok=True)
    return said


def _check(
    out: Path,
    to: str,
    *,
    merge: bool,
) -> None:
    """Refuse what cannot be written, before anything is read."""
    if to not in FORMATS:
        raise RunError(f"--to {to}: give peft, gguf or vllm.")
    if merge and to != "peft":
        raise RunError(f"--merge writes a whole model, --to {to} an adapter; give one of them.")
    if to == "gguf":
        if out.suffix != ".gguf":
            raise RunError(f"--out {out}: name a file that ends in .gguf.")
        if out.exists():
            raise RunError(f"{out} exists already; name a new file.")
        if find_spec("gguf") is None:
            raise RunError("--to gguf needs the package gguf: pip install 'fedgrove[gguf]'.")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; name a new directory.")


def _ours(
    source: Path,
    out: Path,
    base: str | None,
) -> Path:
    """``source`` where it is a directory of ours, else ``out``, where it is written as ours are."""
    from fedgrove.aggregate.foreign import is_adapter, tidied

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
    if not (source / assembly_file.FILE).exists():
        peft.read_adapter(source, dora=True)  # what is not whole is not copied on
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
