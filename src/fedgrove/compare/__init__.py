"""``fedgrove compare``: methods on the same clients, splits, initial weights and budget, over
several seeds.
"""

from __future__ import annotations

from fedgrove.compare.comparison import compare

__all__ = ["compare"]
