"""Starts Flower's own commands as children that end with their parent, whatever becomes of it.

``python -m fedgrove.deploy.launch PARENT COMMAND ARGUMENTS...`` runs a console script of the
installed Flower in this process, and ends it when the process PARENT is gone (also after a SIGKILL,
of which nobody is told).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO

from fedgrove.deploy.certificates import DeployError

_LOOK = 1.0  # seconds between two looks at the parent
_PATIENCE = 8.0  # seconds that a child gets to end by itself


def environment(home: Path) -> dict[str, str]:
    """What every Flower process runs with: no telemetry, nothing installed at run time, our scripts
    in the path.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def start(
    command: Sequence[str],
    *,
    home: Path,
    log: IO[bytes],
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """A Flower command as a child of this process; its output goes to ``log``."""
    whole = [sys.executable, "-m", "fedgrove.deploy.launch", str(os.getpid()), *command]
    # A session of its own, so that Ctrl-C in the terminal reaches only us and we end the children
    # in order.
    return subprocess.Popen(
        whole,
        env=environment(home),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def stop(child: subprocess.Popen[bytes] | None) -> None:
    """End a child: politely, then not."""
    if child is None or child.poll() is not None:
        return
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def need_flower() -> None:
    """Raises ``DeployError`` where Flower is not installed."""
    try:
        import flwr  # noqa: F401
    except ImportError:
        raise DeployError(
            "A deployment needs Flower, which is not installed here; install it with: pip install "
            "'fedgrove[flower]'."
        ) from None


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _watch(parent: int) -> None:
    while _alive(parent):
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def _alive(parent: int) -> bool:
    if os.getppid() == parent:
        return True
    try:  # on a system that does not tell orphans by their parent
        os.kill(parent, 0)
    except OSError:
        return False
    return os.name != "posix"


def main(arguments: Sequence[str]) -> None:
    parent, name = int(arguments[0]), arguments[1]
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    (script,) = entry_points(group="console_scripts", name=name)
    sys.argv = [name, *arguments[2:]]
    script.load()()


if __name__ == "__main__":
    main(sys.argv[1:])
