"""The job: one typed TOML file. Every error names the key, the value and what would be right. Never
imports torch.
"""

from __future__ import annotations

from fedgrove.job.job import Job
from fedgrove.job.sections import (
    DataSection,
    FederationSection,
    LoraSection,
    MethodSection,
    ModelSection,
    PartitionSection,
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
