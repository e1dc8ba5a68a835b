"""Where a run's time and memory went: nested spans, off unless ``profiling`` is on.

``span("forward")`` around a piece of work costs nothing to speak of when no profile is being made.
On a GPU the device is waited for at the end of each span, so a profiled run is a little slower than
others.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

_OFF: AbstractContextManager[None] = nullcontext()
_active: Profile | None = None


class Profile:
    """Seconds by path of span names, for the whole run and for each round."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.total: dict[str, float] = {}
        self.rounds: list[dict[str, Any]] = []
        self._threads = threading.local()  # each thread's open spans, and what its seconds count
        self._adding = threading.Lock()
        self._round: dict[str, float] | None = None

    @property
    def path(self) -> list[str]:
        """The names of this thread's open spans."""
        if not hasattr(self._threads, "path"):
            self._threads.path = []
        found: list[str] = self._threads.path
        return found

    @contextmanager
    def lane(self, path: Sequence[str], count: int) -> Iterator[None]:
        """In a thread that is one of ``count`` at the same time: its spans are below ``path``, at
        their share.
        """
        self._threads.path, self._threads.share = list(path), 1 / count
        yield

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``, below the spans that are open."""
        self.path.append(name)
        path, started = "/".join(self.path), time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) * getattr(self._threads, "share", 1.0)
            self.path.pop()
            with self._adding:
                for sums in (self.total, self._round):
                    if sums is not None:
                        sums[path] = sums.get(path, 0.0) + seconds

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """A round of the run."""
        self._round = {}
        try:
            with self.span("rounds"):
                yield
        finally:
            row = {path.removeprefix("rounds/"): seconds for path, seconds in self._round.items()}
            self.rounds.append({"round": number, "seconds": row, "peak_mb": peak_mb(), **_device()})
            self._round = None

    def content(self) -> dict[str, Any]:
        """What ``profile.json`` holds: seconds by path ("rounds/training/forward"), memory in 10^6
        bytes.
        """
        return {
            "seconds": {**self.total, "total": time.perf_counter() - self.began},
            "rounds": self.rounds,
            "peak_mb": peak_mb(),
            **_device(),
        }


def span(name: str) -> AbstractContextManager[None]:
    """A span of the profile in progress, if there is one."""
    if _active is None:
        return _OFF
    return _active.span(name)


def lane_spans(count: int) -> Callable[[], AbstractContextManager[None]]:
    """What makes spans of threads beside this one, ``count`` at a time, part of the span that is
    open here.
    """
    if _active is None:
        return nullcontext
    return partial(_active.lane, list(_active.path), count)


def round_span(number: int) -> AbstractContextManager[None]:
    """A round of the profile in progress, if there is one."""
    if _active is None:
        return _OFF
    return _active.round(number)


@contextmanager
def profiling() -> Iterator[Profile]:
    """Inside, every span is recorded."""
    global _active
    before, _active = _active, Profile()
    try:
        yield _active
    finally:
        _active = before


def peak_mb() -> float:
    """The most memory that this process has had resident, in 10^6 bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1024
    if sys.platform == "darwin":
        unit = 1
    return most * unit / 1e6


def _device() -> dict[str, float]:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"peak_device_mb": torch.cuda.max_memory_allocated() / 1e6}
    return {}


def rows(seconds: Mapping[str, float]) -> list[tuple[int, str, float]]:
    """(depth, name, seconds) in the order of a table: the largest first, and below a span what its
    parts leave.
    """

    def below(prefix: str, depth: int) -> list[tuple[int, str, float]]:
        names = [
            path
            for path in seconds
            if path.startswith(prefix) and "/" not in path.removeprefix(prefix)
        ]
        found: list[tuple[int, str, float]] = []
        for path in sorted(names, key=lambda each: -seconds[each]):
            found.append((depth, path.removeprefix(prefix), seconds[path]))
            inner = below(f"{path}/", depth + 1)
            if inner:
                rest = seconds[path] - sum(s for d, _, s in inner if d == depth + 1)
                found += [*inner, (depth + 1, "everything else", rest)]
        return found

    return below("", 0)


def save(path: Path, profile: Profile) -> str:
    """Write ``profile.json``, and give back the table for the terminal."""
    content = profile.content()
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return table(content)


def table(content: Mapping[str, Any]) -> str:
    """The profile as text: seconds and their share of the run."""
    whole = content["seconds"]["total"]
    parts: Sequence[tuple[int, str, float]] = rows(
        {k: v for k, v in content["seconds"].items() if k != "total"}
    )
    rest = whole - sum(seconds for depth, _, seconds in parts if depth == 0)
    lines = [
        f"{'  ' * depth + name:<34}{seconds:>9.2f} s {100 * seconds / whole:>6.1f} %"
        for depth, name, seconds in [
            *parts,
            (0, "everything else", rest),
            (0, "the whole run", whole),
        ]
    ]
    memory = f"Peak memory {content['peak_mb']:.0f} MB"
    if "peak_device_mb" in content:
        memory += f", on the device {content['peak_device_mb']:.0f} MB"
    return "\n".join([*lines, memory])
