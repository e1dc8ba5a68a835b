"""How the clients of a method lie: as dots while they can be told apart, as quantiles above."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedgrove.ground.plain import Given

MOST = 300  # dots in a row of the figure

Floats = NDArray[np.float64]


def values_of(row: Given, measure: str) -> Floats:
    """Every client of every seed, ``[n]``."""
    values: list[float] = []
    for clients in row["values"][measure].values():
        values.extend(clients.values())
    return np.array(values)


def clients_are_many(content: Given) -> bool:
    """Whether some method has more clients, over all seeds, than dots have room for."""
    return any(len(values_of(row, "metric")) > MOST for row in content["methods"])
