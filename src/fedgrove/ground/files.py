"""Files that are whole or absent: written to a temporary name, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedgrove.ground.errors import RunError


def write_bytes(path: Path, data: bytes, *, synced: bool = True, private: bool = False) -> None:
    """After a crash ``path`` is the old file or the new one. Raises ``RunError`` (no space, no
    permission). Not ``synced``: whoever wrote many files calls ``sync_all`` in the end.
    ``private``: only its owner may read it, from its first byte on.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if private:
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600, exist_ok=False)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if synced:
            _sync_directory(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def write_text(path: Path, text: str, *, synced: bool = True, private: bool = False) -> None:
    """``write_bytes`` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8"), synced=synced, private=private)


def write_json(path: Path, content: Mapping[str, Any], *, synced: bool = True) -> None:
    """``write_bytes`` for strict JSON, indented."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, synced=synced)


def sync_all() -> None:
    """Everything written so far is on disk, where the system can say so (Windows cannot)."""
    if hasattr(os, "sync"):
        os.sync()


@contextmanager
def whole_directory(folder: Path, *, synced: bool = True) -> Iterator[Path]:
    """A new directory to write into, which takes ``folder``'s place only when all of it is on
    disk (not ``synced``: is written).
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if synced:
        for file in partial.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_file(path: Path, origin: Path) -> bool:
    """Make ``path``, of ``origin``'s content, the same file as it; whether that could be done.

    A hard link: where the file system has none, or no more of this file, ``path`` stays a copy.
    """
    if path.samefile(origin):
        return True
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(origin, partial)
    except OSError:
        return False
    os.replace(partial, path)
    return True


def unwritable(path: Path, error: OSError) -> RunError:
    """The one sentence for a file that cannot be written."""
    reason = error.strerror or str(error)
    return RunError(
        f"cannot write {path} ({reason}): check the disk space and the permissions of its folder."
    )


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable, where the system can open a directory (Windows cannot)."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
