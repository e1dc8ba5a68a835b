"""Where a client's half lives: its data, its disk, and what it allows."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedgrove.ground.errors import RunError
from fedgrove.ground.plain import Plain
from fedgrove.secure.identity import OfTheRun

if TYPE_CHECKING:
    from fedgrove.engines.flower.wire import Note
    from fedgrove.federation import Federation
    from fedgrove.federation.federation import Client
    from fedgrove.job import Job
    from fedgrove.methods.contract import Method
    from fedgrove.secure.identity import Identity


class Machine(Protocol):
    """What ``client.Runtime`` asks of the machine that it runs on."""

    name: str  # the client's; "" for a simulated one before ``client``

    @property
    def folder(self) -> Path:
        """The client's own disk, which survives restarts; a run has ``runs/KEY`` in it."""

    def adapters(self, key: str) -> Path:
        """The folder in which the client's adapter directory is written at the end."""

    def admit(self, job: Job) -> Job:
        """The job as it runs here (device, threads, model's path). Raises ``FedgroveError`` where
        it is not allowed.
        """

    def client(self, job: Job) -> Client:
        """The client's own rows, split as the job says."""

    def rank(self, job: Job) -> int | None:
        """The largest rank that this place affords; None leaves it to the server."""

    def identity(self, run: str) -> Identity:
        """With what the client signs its keys of a round, and whose it takes."""

    def tells(self, row: Plain) -> Plain:
        """What of the client's line of ``federation.json`` (sizes, labels, median length) the
        server may know.
        """

    def received(
        self,
        note: Note,
        blob: bytes,
        method: Method | None,
    ) -> None:
        """A message arrived, and nothing was done with it yet. Raises ``FedgroveError`` to refuse
        it. ``method``: the run's, to check it against; None before the model is loaded.
        """

    def sending(self, note: Note, blob: bytes) -> None:
        """An answer is about to leave. Raises ``FedgroveError`` to hold it back."""


class SimulatedPlace:
    """One client of a simulation. Its disk is a folder of the run, which the server made and
    owns.
    """

    def __init__(
        self,
        run: Path,
        partition: int,
        name: str = "",
    ):
        self.run, self.partition, self.name = run, partition, name

    @property
    def folder(self) -> Path:
        return self.run / "sites" / self.name

    def adapters(self, key: str) -> Path:
        return self.run / "adapters"

    def admit(self, job: Job) -> Job:
        return job

    def client(self, job: Job) -> Client:
        clients = federation(job.to_toml()).clients
        if self.partition >= len(clients):
            raise RunError(
                f"The job has {len(clients)} clients, and this is number {self.partition + 1}."
            )
        found = clients[self.partition]
        self.name = found.name
        return found

    def rank(self, job: Job) -> int | None:
        return None

    def identity(self, run: str) -> Identity:
        return OfTheRun(run, self.name)

    def tells(self, row: Plain) -> Plain:
        return row

    def received(
        self,
        note: Note,
        blob: bytes,
        method: Method | None,
    ) -> None:
        pass

    def sending(self, note: Note, blob: bytes) -> None:
        pass


def simulated(
    run: str,
    directory: str,
    partition: int,
    name: str = "",
) -> SimulatedPlace:
    """A simulated client's place in whichever process works for it. The job's paths start from
    ``directory``.
    """
    try:
        os.chdir(directory)
    except OSError as error:
        raise RunError(
            f"A simulated client cannot enter {directory} ({error.strerror}); all machines of a "
            f"cluster need it."
        ) from None
    return SimulatedPlace(Path(run), partition, name)


@lru_cache(maxsize=1)
def federation(text: str) -> Federation:
    """A job's whole federation, once a process."""
    from fedgrove.federation import build
    from fedgrove.job import Job

    return build(Job.parse(text, "the server's job"))
