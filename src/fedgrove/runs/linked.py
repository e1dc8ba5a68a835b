"""Adapters of equal bytes take the room of one: their files become one file under several names.

A client of a method with one global model leaves with that model. Ten thousand of them then keep
one file of weights, not ten thousand copies. Every name can be deleted, copied or replaced without
the others; only a program that writes into the file itself would change them all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from fedgrove.ground.files import digest_of, same_file
from fedgrove.interop.peft import CARD, HEAD, WEIGHTS

GLOBAL = "_global"


def link_equal(adapters: Path) -> int:
    """Link the equal weights (and heads) of all adapter directories in ``adapters``.

    The card of one that was linked names the first of its kind (``same_weights_as``). Returns how
    many were. Done again it changes nothing; a kill in between leaves whole files.
    """
    origins: dict[str, Path] = {}
    linked = 0
    for folder in _folders(adapters):
        _join(folder / HEAD, origins)
        origin = _join(folder / WEIGHTS, origins)
        if origin is not None:
            _tell(folder / CARD, origin.parent)
            linked += 1
    return linked


def _folders(adapters: Path) -> Iterator[Path]:
    """Every adapter directory in name order, the global one first."""

    def place(folder: Path) -> tuple[bool, str]:
        return folder.name != GLOBAL, folder.name

    for folder in sorted(adapters.iterdir(), key=place):
        if (folder / CARD).exists():
            yield folder


def _join(file: Path, origins: dict[str, Path]) -> Path | None:
    """The file that ``file`` is now a second name of; None where it is the first of its content."""
    if not file.exists():
        return None
    digest = digest_of(file)
    origin = origins.get(digest)
    if origin is not None and same_file(file, origin):
        return origin
    origins[digest] = file  # the first, or the next where a file has all the names that it can have
    return None


def _tell(card: Path, origin: Path) -> None:
    content = json.loads(card.read_text(encoding="utf-8"))
    first = json.loads((origin / CARD).read_text(encoding="utf-8"))
    content["same_weights_as"] = first["client"] or GLOBAL
    partial = card.with_name(card.name + ".partial")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    partial.write_text(text, encoding="utf-8")  # not synced: a finish that was cut is done again
    os.replace(partial, card)
