"""Pure tensor algebra on low-rank adapters: no models, no files."""

from fedgrove.adapters.adapter import Adapter, Factors, Site, alpha_of, fresh, scale_of
from fedgrove.adapters.assembly import (
    Assembly,
    Convex,
    Extra,
    Junction,
    Mix,
    Term,
    Weighted,
    as_one_adapter,
)

__all__ = [
    "Adapter",
    "Assembly",
    "Convex",
    "Extra",
    "Factors",
    "Junction",
    "Mix",
    "Site",
    "Term",
    "Weighted",
    "alpha_of",
    "as_one_adapter",
    "fresh",
    "scale_of",
]
