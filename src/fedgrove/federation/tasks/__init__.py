"""The tasks: one file each. ``task_class`` finds the one that a job's data section means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgrove.federation.embedded import EMBEDDED
from fedgrove.federation.tasks.base import Batch, Example, Task
from fedgrove.federation.tasks.classify_images import ClassifyImages
from fedgrove.federation.tasks.classify_text import ClassifyText
from fedgrove.federation.tasks.generate import Generate

if TYPE_CHECKING:
    from fedgrove.job.sections import DataSection

__all__ = [
    "TASKS",
    "Batch",
    "ClassifyImages",
    "ClassifyText",
    "Example",
    "Generate",
    "Task",
    "task_class",
    "task_name",
]

#: the values of ``data.task``
TASKS: dict[str, type[Task]] = {
    "classify-text": ClassifyText,
    "classify-images": ClassifyImages,
    "generate": Generate,
}


def task_name(data: DataSection) -> str:
    """``data.task``; "auto" is what an embedded data set is for, and text classification for the
    user's own data.
    """
    if data.task != "auto":
        return data.task
    if data.source == "embedded" and data.name in EMBEDDED:
        return EMBEDDED[data.name].task
    return "classify-text"


def task_class(data: DataSection) -> type[Task]:
    """The class of the job's task."""
    return TASKS[task_name(data)]
