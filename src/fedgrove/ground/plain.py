"""Names for data without a form of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Plain = dict[str, Any]  # what JSON can say: a line of a log, a summary, a card
Given = Mapping[str, Any]  # the same or a tree of tensors, only read
