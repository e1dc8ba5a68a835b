"""Whether a job can be run as it is, asked before anything is written or started."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fedgrove.defence.check import refuse_unfit as refuse_defence
from fedgrove.defence.rules import RULES
from fedgrove.ground.errors import JobError
from fedgrove.methods.rule import takes_magnitudes
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
    _refuse_dora(parts)
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


def _refuse_dora(parts: Parts) -> None:
    """What has no meaning for DoRA's magnitudes."""
    job, method = parts.job, parts.method
    if not job.lora.dora:
        return
    if not takes_magnitudes(type(method)):
        raise JobError(
            f"lora.dora = true trains a magnitude for every output beside A and B, for which "
            f"{method.title} has no rule; set it to false, or choose a method whose server takes the "
            f"mean of each tensor (such as fedit) or none (local)."
        )
    if job.run.noise:
        raise JobError(
            "run.noise = true measures low-rank products, and DoRA's update is none; set one of "
            "lora.dora and run.noise to false."
        )
    rule = RULES.get(job.defence.rule)
    if job.defence.active and rule is not None and rule.weigh is not None:
        raise JobError(
            f'defence.rule = "{job.defence.rule}" compares clients by their products B A, which do '
            f"not show DoRA's magnitudes; choose median or trimmed-mean, or defence.norm alone."
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
