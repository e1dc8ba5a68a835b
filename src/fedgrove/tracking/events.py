"""``RUN/events.jsonl``: what happened to clients beside training. The file exists only where
something did.

It is a log of the process, not a part of the run's result: a resume adds to it and takes nothing
away.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fedgrove.ground import lines
from fedgrove.tracking.callback import Callback


class Events(Callback):
    """Appends one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path

    def client_event(
        self,
        round: int,
        client: str,
        what: str,
        reason: str,
        trace: str = "",
    ) -> None:
        self.write(round, client, what, reason, trace=trace)

    def write(self, round: int, client: str, event: str, reason: str, **more: object) -> None:
        """``event``: "left out", "joined", "refused", "late", "not measured", ...; ``reason``: a
        clause for people.
        """
        said = {key: value for key, value in more.items() if value}
        now = datetime.now(UTC)
        line = {
            "time": now.isoformat(timespec="seconds"),
            "round": round,
            "client": client,
            "event": event,
            "reason": reason,
            **said,
        }
        lines.append(self.path, line)
