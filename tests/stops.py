"""Runs that are cut off, to be resumed."""

from __future__ import annotations

import signal
from typing import Any

from fedgrove.tracking.callback import Callback


class StopAfter(Callback):
    """Interrupts the run as Ctrl-C would, in the middle of a round: after so many of its clients."""

    def __init__(self, round: int, clients: int = 1):
        self.round, self.clients, self.seen = round, clients, 0

    def client_done(self, round: int, line: Any) -> None:
        self.seen += round == self.round
        if round == self.round and self.seen == self.clients:
            raise KeyboardInterrupt


def hears_ctrl_c() -> None:
    """For a process that a test starts: a test that runs in the background of a shell would hand on
    that Ctrl-C is ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
