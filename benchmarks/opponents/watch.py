"""Run a command and watch its memory from outside: the command, its children, and whatever they
started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MARK = "FG_WATCHED"


@dataclass(frozen=True)
class Watched:
    seconds: float
    peak_mb: float  # proportional set size of all processes together: shared pages are counted once
    code: int
    tail: str


def watch(
    command: Sequence[str], environment: dict[str, str], log: Path, every: float = 1.0
) -> Watched:
    """Run to the end. Processes are found by an environment variable, so that detached ones count
    too.
    """
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    peak, done = 0.0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, sum(_pss(pid) for pid in _marked(mark)))
            done.wait(every)

    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, _MARK: mark},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        done.set()
        thread.join()
    _end(mark)
    return Watched(
        seconds, peak, code, "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    )


def _marked(mark: str) -> list[int]:
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # gone, or another user's
    return found


def _pss(pid: int) -> float:
    """Megabytes (10^6 bytes)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


def _end(mark: str) -> None:
    """Nothing that the command left behind may slow the next one down."""
    for pid in _marked(mark):
        try:
            os.kill(pid, signal.SIGTERM)
        except OSError:
            continue
    for _ in range(50):
        if not _marked(mark):
            return
        time.sleep(0.1)
