"""One file per task: how rows become batches, what the head computes, and what is measured."""

from fedgrove.federation.tasks.base import Batch, Example, Task
from fedgrove.federation.tasks.classify_text import ClassifyText

__all__ = ["Batch", "ClassifyText", "Example", "Task"]
