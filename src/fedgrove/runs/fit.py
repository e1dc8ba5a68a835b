"""Whether a job can be run as it is, asked before anything is written or started."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fedgrove.defence.check import refuse_unfit as refuse_defence
from fedgrove.ground.errors import JobError
from fedgrove.privacy.check import refuse_unfit as refuse_privacy

if TYPE_CHECKING:
    from fedgrove.methods.contract import ClientInfo
    from fedgrove.runs.parts import Parts


def refuse_unfit(
    parts: Parts,
    clients: Collection[ClientInfo],
    held_out: Collection[ClientInfo] = (),
    *,
    local: bool,
) -> None:
    """Raise ``JobError`` where method, clients, privacy or engine cannot do what the job says.

    ``local``: all clients are simulated in this process.
    """
    parts.method.check([*clients, *held_out])
    if parts.method.skips_layers and parts.base.head == "seq2seq":
        raise JobError(
            f"{parts.method.title} leaves out layers, but {parts.base.name} is an encoder-decoder, "
            "whose encoder is seen through its decoder's layers alone; choose a decoder, or another "
            "method."
        )
    if parts.job.run.noise and not local:
        raise JobError(
            "run.noise = true looks into what is private to the clients, which only the local "
            "engine can; set it to "
            "false, or run with the local engine."
        )
    if parts.task.windows and parts.job.privacy.example_level:
        raise JobError(
            f"privacy.example_clip bounds an example, but data.task = {parts.task.name!r} reads a long "
            "row as several; leave it out, or hide whole clients (privacy.client_clip)."
        )
    _refuse_federation(parts, len(clients))
    refuse_defence(parts.job, parts.task, parts.method, clients, local=local)
    refuse_privacy(
        parts.job,
        parts.method,
        parts.head,
        clients=len(clients),
        held_out=bool(held_out),
    )


def _refuse_federation(parts: Parts, clients: int) -> None:
    """What of ``[federation]`` this method or this number of clients cannot do."""
    wanted, method = parts.job.federation, parts.method
    if wanted.late == "next" and not method.stale:
        raise JobError(
            f'federation.late = "next", but an update of {method.title} means something only in '
            f"the round it was "
            'trained in; set it to "drop".'
        )
    drawn = max(1, round(wanted.fraction * clients))
    if wanted.min_clients > drawn:
        raise JobError(
            f"federation.min_clients = {wanted.min_clients}, but a round draws {drawn} of "
            f"{clients} clients "
            f"(federation.fraction = {wanted.fraction:g}); lower it, or draw more."
        )
