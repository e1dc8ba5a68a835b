"""The job: one typed TOML file. Every error names the key, the value and what would be right. Never
imports torch.
"""

from __future__ import annotations

from fedgrove.job.data import DataSection, PartitionSection
from fedgrove.job.job import Job
from fedgrove.job.sections import (
    FederationSection,
    LoraSection,
    MethodSection,
    ModelSection,
    RunSection,
    Section,
    TrainSection,
)

__all__ = [
    "DataSection",
    "FederationSection",
    "Job",
    "LoraSection",
    "MethodSection",
    "ModelSection",
    "PartitionSection",
    "RunSection",
    "Section",
    "TrainSection",
]
