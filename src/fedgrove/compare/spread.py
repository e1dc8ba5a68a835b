"""How the clients of a method lie: as dots while they can be told apart, as quantiles above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 300  # dots in a row of the figure

Floats = NDArray[np.float64]


def values_of(row: Mapping[str, Any], measure: str) -> Floats:
    """Every client of every seed, ``[n]``."""
    seeds = row["values"][measure].values()
    return np.array([value for clients in seeds for value in clients.values()])


def clients_are_many(content: Mapping[str, Any]) -> bool:
    """Whether some method has more clients, over all seeds, than dots have room for."""
    return any(len(values_of(row, "metric")) > MOST for row in content["methods"])
