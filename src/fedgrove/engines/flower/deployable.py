"""A job as it can run on a grid: what needs everybody's data in one process is refused. No Flower
here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgrove.federation.tasks import task_class, task_name
from fedgrove.ground.errors import JobError
from fedgrove.runs import prepare
from fedgrove.runs.parts import one_by_one

if TYPE_CHECKING:
    from fedgrove.job import Job


def deployable(job: Job) -> Job:
    """The job between sites. What only a simulation can do is refused with a ``JobError``; what a
    simulation looks up in everybody's data must be in the job.
    """
    missing = task_class(job.data).lacks(job.data)
    if missing is not None:
        key, what = missing
        raise JobError(
            f"data.{key} is missing: sites do not see each other's data, so the job must name "
            f"{what}."
        )
    if job.model.adapter is not None:
        raise JobError(
            f"model.adapter = '{job.model.adapter}' is a directory of this machine, which the sites "
            "do not have; write the model with the adapter in it (`fedgrove export --merge`), give "
            "it to every site and name it as model.name."
        )
    held_out = job.federation.held_out
    if isinstance(held_out, float) and held_out > 0:
        raise JobError(
            f"federation.held_out = {held_out} draws clients by their data, which stay at the "
            "sites; name the sites to hold out, or leave it out."
        )
    if job.run.noise:
        raise JobError(
            "run.noise = true looks into what is private to the clients, which stays at the sites; "
            "set it to false."
        )
    newcomer_head = prepare.newcomer_head(job, bool(named_held_out(job)))
    changed = job.replace(
        data={"task": task_name(job.data)}, federation={"newcomer_head": newcomer_head}
    )
    return alone(changed)


def alone(job: Job) -> Job:
    """Each client trains in a message of its own, so an automatic cohort is one client."""
    if job.train.cohort == "auto":
        return one_by_one(job)
    return job


def named_held_out(job: Job) -> set[str]:
    """The sites that the job holds out by name."""
    held_out = job.federation.held_out
    if isinstance(held_out, tuple):
        return set(held_out)
    return set()
