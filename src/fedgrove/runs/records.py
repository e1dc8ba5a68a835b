"""What a run leaves on disk while it goes on, and who looks on: given to the round loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedgrove.runs.noise import Lab
from fedgrove.tracking.callback import Callback, Callbacks
from fedgrove.tracking.checkpoint import Checkpoints
from fedgrove.tracking.events import Events
from fedgrove.tracking.metrics import MetricsLog


@dataclass(frozen=True, eq=False)
class Records:
    """``watch`` has the files first: a round's metrics are on disk before its checkpoint."""

    out: Path  # the run's directory
    watch: Callback
    checkpoints: Checkpoints
    lab: Lab = field(default_factory=Lab)

    @classmethod
    def at(cls, out: Path, watch: Callback, lab: Lab | None = None) -> Records:
        """The files of a run in its directory."""
        files = [MetricsLog(out / "metrics.jsonl"), Events(out / "events.jsonl")]
        return cls(
            out,
            Callbacks([*files, watch]),
            Checkpoints(out / "checkpoints"),
            lab or Lab(),
        )
