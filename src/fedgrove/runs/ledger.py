"""What a run has cost so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedgrove.runs.engine import Arrival
from fedgrove.training.profile import span


def _no_seconds() -> dict[str, float]:
    return {
        "total": 0.0,
        "training": 0.0,
        "evaluation": 0.0,
        "server": 0.0,
    }


@dataclass
class Ledger:
    """Bytes, numbers and seconds; part of every checkpoint."""

    bytes_up: int = 0
    bytes_down: int = 0
    # numbers, by client, one for each of its rounds
    trained: dict[str, list[int]] = field(default_factory=dict)
    up: dict[str, list[int]] = field(default_factory=dict)
    down: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=_no_seconds)

    def arrived(self, arrival: Arrival) -> None:
        self.bytes_up += arrival.bytes_up
        self.bytes_down += arrival.bytes_down
        name = arrival.update.client
        self.trained.setdefault(name, []).append(arrival.trained)
        self.up.setdefault(name, []).append(arrival.up)
        self.down.setdefault(name, []).append(arrival.down)

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Add the time spent inside to ``seconds``."""
        started = time.perf_counter()
        try:
            with span(what):
                yield
        finally:
            self.seconds[what] += time.perf_counter() - started
