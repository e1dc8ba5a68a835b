"""Offline aggregation: one server round over PEFT adapter directories, without the base model."""

from fedgrove.aggregate.aggregate import RULES, Done, aggregate

__all__ = ["RULES", "Done", "aggregate"]
