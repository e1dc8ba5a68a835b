"""What of ``[privacy]`` a job can have, asked before anything is written: one sentence for each
that it cannot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgrove.ground.errors import JobError
from fedgrove.methods.contract import Method
from fedgrove.methods.protocols import Counted, Probes, needs_each, reads
from fedgrove.privacy import accountant, randomness
from fedgrove.privacy.masked import weighted

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.methods.head import HeadPolicy


def refuse_unfit(
    job: Job,
    method: Method,
    head: HeadPolicy,
    *,
    clients: int,
    held_out: bool,
) -> None:
    """Raise ``JobError`` where the job's privacy cannot be had."""
    wanted = job.privacy
    if wanted.client_level:
        _client_level(job, method, head)
    if wanted.example_level:
        _example_level(method, held_out)
    if wanted.client_noise or wanted.example_noise:
        accountant.require()
    if wanted.client_noise or wanted.example_level or wanted.secure_aggregation:
        randomness.require()
    if job.run.noise and (wanted.client_level or wanted.example_level):
        raise JobError(
            "run.noise = true records what is private to the clients, and [privacy] is there to "
            "hide it; leave out one "
            "of them."
        )
    if wanted.secure_aggregation:
        fraction = job.federation.fraction
        if wanted.client_noise and fraction < 1:
            raise JobError(
                f"privacy.client_noise draws each client by a coin (federation.fraction = "
                f"{fraction:g}), so that a "
                "round may have one, whose update is the sum; set federation.fraction = 1 with "
                "secure aggregation."
            )
        if max(1, round(fraction * clients)) < 2:
            raise JobError(
                "privacy.secure_aggregation needs two clients or more in a round, because the sum "
                "of one is its "
                "update; raise federation.fraction or federation.clients."
            )


def _client_level(
    job: Job,
    method: Method,
    head: HeadPolicy,
) -> None:
    if job.privacy.secure_aggregation:
        key = "privacy.secure_aggregation"
    else:
        key = "privacy.clip"
    if not method.federated:
        raise JobError(f"{key} has no use with {method.title}, which sends nothing; leave it out.")
    if why := needs_each(method):
        raise JobError(
            f"{key} limits what the server learns to the sum of the clients' changes, but with "
            f"{method.title} that is "
            f"not enough: {why}; choose a method such as fedit, ffa-lora, fedsa-lora, or "
            f"privacy.example_noise instead."
        )
    hidden = job.privacy.secure_aggregation and not job.privacy.client_noise
    if weighted(method) and not hidden:
        raise JobError(
            f"{key} needs the same weight for every client, or weights would tell of the data; set "
            f"method.weights = "
            '"uniform".'
        )
    if job.privacy.client_noise and isinstance(method, Counted):
        raise JobError(
            f"privacy.client_noise needs a mean whose divisor is the same whoever takes part, but "
            f"{method.title} "
            "divides by the number of clients that drew each index; choose another method, or "
            "privacy.example_noise."
        )
    if head.mode == "local" and head.newcomers:
        raise JobError(
            f"federation.newcomer_head sends up each client's own head, which it did not receive, "
            f"so {key} has no "
            "change to limit; set it to false."
        )
    if job.federation.late == "next":
        raise JobError(
            f'federation.late = "next" lets a client count twice in a round, which {key} must not; '
            f'set it to "drop".'
        )


def _example_level(method: Method, held_out: bool) -> None:
    if what := reads(method):
        raise JobError(
            f"privacy.example_clip makes every training step private, but {method.title} also "
            f"reads {what}; "
            "choose another method, or leave it out."
        )
    if held_out and isinstance(method, Probes):
        raise JobError(
            f"privacy.example_clip does not count the probe with which {method.title} places a "
            f"held-out client; "
            "set federation.held_out = 0."
        )
