"""What of ``[defence]`` and ``[attack]`` a job can have, asked before anything is written."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fedgrove.defence import attack
from fedgrove.defence.rules import RULES
from fedgrove.defence.shield import FOOLSGOLD
from fedgrove.ground.errors import JobError
from fedgrove.methods.protocols import centres, unmeasured

if TYPE_CHECKING:
    from fedgrove.federation.tasks import Task
    from fedgrove.job import Job
    from fedgrove.methods.contract import ClientInfo, Method


def refuse_unfit(
    job: Job,
    task: Task,
    method: Method,
    clients: Collection[ClientInfo],
    *,
    local: bool,
) -> None:
    """Raise ``JobError`` where the defence or the attack cannot be had. ``local``: all clients are
    simulated here.
    """
    _defence(job, method)
    _measured(job, method)
    if job.attack.active and not local:
        raise JobError(
            "[attack] is there to try a defence in simulation; leave it out, or run with the local "
            "engine."
        )
    if job.attack.active and job.privacy.client_level:
        raise JobError(
            "[attack] alters updates in one process, after privacy.clip has clipped them; leave one "
            "of them out."
        )
    attack.refuse_unfit(job.attack, task, method, clients)


def _measured(job: Job, method: Method) -> None:
    """What is measured from where a client started needs a server that can tell."""
    clause = unmeasured(method)
    if not clause:
        return
    for key, asked in (
        ("defence.norm", job.defence.norm is not None),
        (f'defence.rule = "{FOOLSGOLD}"', job.defence.rule == FOOLSGOLD),
        (f'attack.kind = "{job.attack.kind}"', job.attack.alters),
    ):
        if asked:
            raise JobError(
                f"{key} is about what a client changed in a round, which cannot be told with "
                f"{method.title}: {clause}; leave it out."
            )


def _defence(job: Job, method: Method) -> None:
    wanted = job.defence
    if not wanted.active:
        return
    if not method.federated:
        raise JobError(
            f"[defence] has no use with {method.title}, which sends nothing; leave it out."
        )
    if job.privacy.secure_aggregation:
        raise JobError(
            "[defence] looks at each client's update, which privacy.secure_aggregation hides; "
            "privacy.clip is the bound that works under masks, where each client clips itself."
        )
    if job.privacy.client_level:
        raise JobError(
            "privacy.clip bounds every change already and gives the server's half their mean "
            "alone; leave [defence] out, or privacy.clip."
        )
    if job.federation.late == "next":
        raise JobError(
            "[defence] measures each change from what its round began with; set federation.late = "
            '"drop".'
        )
    rule = RULES.get(wanted.rule)
    if rule is None:
        return
    has = centres(method)
    if has == "none":
        raise JobError(
            f'defence.rule = "{wanted.rule}" takes the place of a mean, and the server of '
            f'{method.title} takes none of its own; set defence.norm, or rule = "foolsgold".'
        )
    if rule.value is not None and has == "weights":
        raise JobError(
            f'defence.rule = "{wanted.rule}" works on each number, but {method.title} averages '
            "products, whose numbers it never forms; choose krum, multi-krum, geometric-median or "
            "outliers."
        )
