"""Data split by columns: parties that each hold other columns of the same entities (docs/vertical.md).

Unlike a federation of rows, a message goes up for every batch, state belongs to entities, the labels
are at one party, and no party predicts alone. So this is a room of its own, which shares the kernel.
"""

from __future__ import annotations

from fedgrove.vertical.job import VerticalJob
from fedgrove.vertical.start import run

__all__ = ["VerticalJob", "run"]
