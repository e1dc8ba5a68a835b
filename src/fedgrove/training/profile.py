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

import torch

from fedgrove.ground.plain import Given, Plain

#: (depth, name, seconds)
Row = tuple[int, str, float]

_OFF: AbstractContextManager[None] = nullcontext()
_active: Profile | None = None


class Profile:
    """Seconds by path of span names, for the whole run and for each round."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.total: dict[str, float] = {}
        self.rounds: list[Plain] = []
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
        self._threads.path = list(path)
        self._threads.share = 1 / count
        yield

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``, below the spans that are open."""
        self.path.append(name)
        path = "/".join(self.path)
        started = time.perf_counter()
        try:
            yield
        finally:
            if _on_device():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            share = getattr(self._threads, "share", 1.0)
            self.path.pop()
            self._add(path, seconds * share)

    def _add(self, path: str, seconds: float) -> None:
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
            row = {}
            for path, seconds in self._round.items():
                row[path.removeprefix("rounds/")] = seconds
            line = {
                "round": number,
                "seconds": row,
                "peak_mb": peak_mb(),
                **_device(),
            }
            self.rounds.append(line)
            self._round = None

    def content(self) -> Plain:
        """What ``profile.json`` holds: seconds by path ("rounds/training/forward"), memory in 10^6
        bytes.
        """
        whole = time.perf_counter() - self.began
        return {
            "seconds": {**self.total, "total": whole},
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
    before = _active
    _active = Profile()
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


def _on_device() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _device() -> dict[str, float]:
    if not _on_device():
        return {}
    most = torch.cuda.max_memory_allocated()
    return {"peak_device_mb": most / 1e6}


def rows(seconds: Mapping[str, float]) -> list[Row]:
    """(depth, name, seconds) in the order of a table: the largest first, and below a span what its
    parts leave.
    """

    def below(prefix: str, depth: int) -> list[Row]:
        names: dict[str, str] = {}  # of the spans right below, by path
        for path in seconds:
            name = path.removeprefix(prefix)
            if path.startswith(prefix) and "/" not in name:
                names[path] = name
        found: list[Row] = []
        for path in sorted(names, key=lambda each: -seconds[each]):
            found.append((depth, names[path], seconds[path]))
            inner = below(f"{path}/", depth + 1)
            if inner:
                rest = _rest(seconds[path], inner, depth + 1)
                found += [*inner, rest]
        return found

    return below("", 0)


def _rest(whole: float, inner: Sequence[Row], depth: int) -> Row:
    """What the spans of a depth leave of the whole."""
    parts = [seconds for each, _, seconds in inner if each == depth]
    return depth, "everything else", whole - sum(parts)


def save(path: Path, profile: Profile) -> str:
    """Write ``profile.json``, and give back the table for the terminal."""
    content = profile.content()
    text = json.dumps(content, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    return table(content)


def table(content: Given) -> str:
    """The profile as text: seconds and their share of the run."""
    spans = dict(content["seconds"])
    whole: float = spans.pop("total")
    parts = rows(spans)
    parts += [_rest(whole, parts, 0), (0, "the whole run", whole)]
    lines = []
    for depth, name, seconds in parts:
        indented = "  " * depth + name
        share = 100 * seconds / whole
        lines.append(f"{indented:<34}{seconds:>9.2f} s {share:>6.1f} %")
    memory = f"Peak memory {content['peak_mb']:.0f} MB"
    if "peak_device_mb" in content:
        memory += f", on the device {content['peak_device_mb']:.0f} MB"
    return "\n".join([*lines, memory])
