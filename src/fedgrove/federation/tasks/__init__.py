"""The tasks: one file each. ``task_class`` finds the one that a job's data section means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgrove.federation.tasks.base import Batch, Example, HeadedTask, Task, WritingTask
from fedgrove.federation.tasks.classify_images import ClassifyImages
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.federation.tasks.generate import Generate
from fedgrove.ground.registry import Registry

if TYPE_CHECKING:
    from fedgrove.job import DataSection

__all__ = [
    "AUTO",
    "GROUP",
    "TASKS",
    "Batch",
    "ClassifyImages",
    "ClassifyText",
    "Example",
    "Generate",
    "HeadedTask",
    "Task",
    "WritingTask",
    "register",
    "task_class",
    "task_name",
    "task_of",
]

GROUP = "fedgrove.tasks"
#: by the values of ``data.task``
TASKS: Registry[Task] = Registry(
    "task",
    "data.task",
    GROUP,
    "fedgrove.federation.tasks",
    lambda: Task,
)
register = TASKS.register

AUTO = "classify-text"  # what data.task = "auto" means where a source does not know better


def task_name(data: DataSection) -> str:
    """``data.task``; "auto" is what the data are for, where their source knows it, and text
    classification for the user's own.
    """
    return task_class(data).name


def task_class(data: DataSection) -> type[Task]:
    """The class of the job's task."""
    return data.task_class


def task_of(data: DataSection) -> Task:
    """The task with the job's settings."""
    return task_class(data).of(data)
