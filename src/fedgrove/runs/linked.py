"""Adapters of equal bytes take the room of one: their files become one file under several names.

A client of a method with one global model leaves with that model. Ten thousand of them then keep
one file of weights, not ten thousand copies. Every name can be deleted, copied or replaced without
the others; only a program that writes into the file itself would change them all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedgrove.ground.files import digest_of, same_file
from fedgrove.interop.peft import CARD, GLOBAL, HEAD, WEIGHTS


def link_equal(adapters: Path) -> int:
    """Link the equal weights (and heads) of all adapter directories in ``adapters``.

    One process has linked its own as it wrote them (``interop.copies``); what several wrote, and
    what was named in another order, is put right here. The card of one that is linked names the
    first of its kind (``same_weights_as``). Returns how many are. Done again it changes nothing; a
    kill in between leaves whole files.
    """
    folders = list(_folders(adapters))
    _join([folder / HEAD for folder in folders])
    _join([folder / WEIGHTS for folder in folders])
    first: dict[int, str] = {}  # by inode, in the order of the folders
    linked = 0
    for folder in folders:
        if not (folder / WEIGHTS).exists():
            continue
        content = json.loads((folder / CARD).read_text(encoding="utf-8"))
        inode = (folder / WEIGHTS).stat().st_ino
        origin = first.get(inode)
        if origin is None:
            first[inode] = content["client"] or GLOBAL
        else:
            linked += 1
        _tell(folder / CARD, content, origin)
    return linked


def _folders(adapters: Path) -> Iterator[Path]:
    """Every adapter directory in name order, the global one first."""

    def place(folder: Path) -> tuple[bool, str]:
        return folder.name != GLOBAL, folder.name

    for folder in sorted(adapters.iterdir(), key=place):
        if (folder / CARD).exists():
            yield folder


def _join(files: Sequence[Path]) -> None:
    """Make the files of equal content names of one: of that which has the most names already."""
    digests: dict[int, str] = {}  # by inode
    kinds: dict[str, dict[int, list[Path]]] = {}  # by content and inode
    for file in files:
        if not file.exists():
            continue
        inode = file.stat().st_ino
        if inode not in digests:
            digests[inode] = digest_of(file)
        kinds.setdefault(digests[inode], {}).setdefault(inode, []).append(file)
    for groups in kinds.values():
        several = sorted(groups.values(), key=len, reverse=True)  # stable: the first of equals
        origin = several[0][0]
        for file in (file for group in several[1:] for file in group):
            if not same_file(file, origin):
                origin = file  # the next, where a file has all the names that it can have


def _tell(card: Path, content: dict[str, object], origin: str | None) -> None:
    """Write ``same_weights_as`` where the card says otherwise; None: nothing to say."""
    if content.get("same_weights_as") == origin:
        return
    content.pop("same_weights_as", None)
    if origin is not None:
        content["same_weights_as"] = origin
    partial = card.with_name(card.name + ".partial")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    partial.write_text(text, encoding="utf-8")  # not synced: a finish that was cut is done again
    os.replace(partial, card)
