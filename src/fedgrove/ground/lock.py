"""The file that says who works in a directory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

LOCK = "run.lock"


def sign(handle: int) -> None:
    """Write this process and its machine into the open lock file."""
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()} {platform.node()}\n".encode())


def at_work(folder: Path) -> bool:
    """Whether a process works in ``folder``. One that was killed leaves its lock file, so who signed it
    is looked for where that was on this machine; elsewhere the file is believed.
    """
    try:
        signed = (folder / LOCK).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return False
    if os.name != "posix" or len(signed) != 2 or signed[1] != platform.node():
        return True
    try:
        os.kill(int(signed[0]), 0)  # signal 0 only asks
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
