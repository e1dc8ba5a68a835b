"""Offline aggregation: one server round over PEFT adapter directories, without the base model."""

from fedgrove.aggregate.aggregate import Done, aggregate
from fedgrove.aggregate.options import rules

__all__ = ["Done", "aggregate", "rules"]
