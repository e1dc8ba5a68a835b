"""Offline aggregation: one server round over PEFT adapter directories, without the base model."""

from fedgrove.aggregate.aggregate import Written, aggregate
from fedgrove.aggregate.options import rules

__all__ = ["Written", "aggregate", "rules"]
