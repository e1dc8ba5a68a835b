"""The metrics, and how a finished model is measured by them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedgrove.federation.metrics.base import Answers, Measured, Metric
from fedgrove.ground.errors import JobError
from fedgrove.ground.registry import Registry

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Task

__all__ = ["GROUP", "METRICS", "Answers", "Measured", "Metric", "measures", "register"]

GROUP = "fedgrove.metrics"
METRICS: Registry[Metric] = Registry(
    "metric", "data.metrics", GROUP, "fedgrove.federation.metrics", lambda: Metric
)
register = METRICS.register


def measures(names: Iterable[str], answers: Answers, task: str) -> dict[str, Any]:
    """What the named metrics find, in their order; None where one is not defined. ``task`` is for
    messages.

    Raises ``JobError`` for a metric that needs what the task does not give.
    """
    found: dict[str, Any] = {}
    for name in names:
        metric = METRICS.find(name)()
        missing = [need for need in metric.needs if getattr(answers, need) is None]
        if missing:
            raise JobError(
                f"data.metrics has {name!r}, which needs {missing[0]}, but the task {task!r} does "
                "not give it; leave it out."
            )
        found[name] = _plain(metric(answers))
    return found


def asked(task: type[Task[Any]], more: Iterable[str] = ()) -> list[str]:
    """The names of a task's own metrics and of those that a job asks for besides."""
    return list(dict.fromkeys([*task.metrics, *more]))


def _plain(value: Measured) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return float(value) if math.isfinite(value) else None
