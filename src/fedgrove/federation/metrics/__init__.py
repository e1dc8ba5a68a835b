"""The metrics, and how a finished model is measured by them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgrove.federation.metrics.base import Answers, Measured, Metric
from fedgrove.ground.plain import Plain
from fedgrove.ground.registry import Registry

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Task

__all__ = [
    "GROUP",
    "METRICS",
    "Answers",
    "Measured",
    "Metric",
    "asked",
    "measures",
    "register",
]

GROUP = "fedgrove.metrics"
METRICS: Registry[Metric] = Registry(
    "metric",
    "data.metrics",
    GROUP,
    "fedgrove.federation.metrics",
    lambda: Metric,
)
register = METRICS.register


def measures(names: Iterable[str], answers: Answers) -> Plain:
    """What the named metrics find, in their order; None where one is not defined. That the task
    gives what each needs was checked with the job.
    """
    return {name: _plain(_found(METRICS.find(name)(), answers)) for name in names}


def asked(task: Task, more: Iterable[str] = ()) -> list[str]:
    """The names of a task's own metrics and of those that a job asks for besides."""
    return list(dict.fromkeys([*task.wanted(), *more]))


def _found(metric: Metric, answers: Answers) -> Measured:
    """What a metric finds; nan where a diverged model gives scores that are no numbers."""
    if "scores" in metric.needs and not np.isfinite(np.asarray(answers.scores, dtype=float)).all():
        return math.nan
    return metric(answers)


def _plain(value: Measured) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return float(value) if math.isfinite(value) else None
