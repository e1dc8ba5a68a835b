"""Adapter directories of equal content that are one file from the start.

Clients of a method with one global model all leave with it. What a directory would hold is hashed
before anything is written: the first of its kind is written, every other gets a second name of its
file (a hard link) and a copy of its configuration.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, uint8


@dataclass(frozen=True)
class Origin:
    """The first file of its content, as it was written."""

    path: Path
    inode: int
    client: str | None


class Copies:
    """What one process has written of a run's adapters. Whoever has one syncs the disk in the end,
    once for all directories.
    """

    def __init__(self) -> None:
        self._origins: dict[str, Origin] = {}

    def linked(self, key: str, file: Path) -> Origin | None:
        """Make ``file``, which is not there, a name of the first of its content; None where there
        is no first, or no link can be made of it.
        """
        origin = self._origins.get(key)
        if origin is None:
            return None
        try:
            if origin.path.stat().st_ino != origin.inode:  # written anew since
                return None
            os.link(origin.path, file)
        except OSError:  # no links here, or no more of this file
            return None
        return origin

    def keep(
        self,
        key: str,
        written: Path,
        file: Path,
        client: str | None,
    ) -> None:
        """``written``, which becomes ``file``, is the first of its content, or the next where that
        has all the names that it can have.
        """
        self._origins[key] = Origin(file, written.stat().st_ino, client)


def content_key(tensors: Mapping[str, Tensor], *described: object) -> str:
    """The SHA-256 of tensors [any shape], by name, and of what else is written with them."""
    digest = hashlib.sha256(repr(described).encode())
    for name, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"\n{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def copy_beside(
    origin: Path,
    name: str,
    folder: Path,
) -> None:
    """The file ``name`` of the origin's directory, as a file of its own."""
    shutil.copyfile(origin.with_name(name), folder / name)
