"""Statistics over clients, the same in a run's summary, its report, a comparison and the display.

``tail10`` is the 10th-percentile client, ``numpy.percentile(values, 10)`` with linear interpolation
between order statistics; ``std`` is over the whole population (``ddof=0``). Missing values
(``None``, NaN) are left out; with none left the result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Value = float | int | None


def present(values: Iterable[Value]) -> list[float]:
    """The values that are numbers, in order."""
    return [float(value) for value in values if value is not None and not math.isnan(value)]


def mean(values: Iterable[Value]) -> float:
    """The arithmetic mean."""
    numbers = present(values)
    if not numbers:
        return math.nan
    return math.fsum(numbers) / len(numbers)


def std(values: Iterable[Value]) -> float:
    """Population standard deviation (``ddof=0``)."""
    numbers = present(values)
    if not numbers:
        return math.nan
    centre = mean(numbers)
    return math.sqrt(math.fsum((number - centre) ** 2 for number in numbers) / len(numbers))


def tail10(values: Iterable[Value]) -> float:
    """The 10th-percentile client."""
    return percentiles(values, [10])[0]


def percentiles(values: Iterable[Value], shares: Sequence[float]) -> list[float]:
    """Percentiles (0 to 100) by linear interpolation."""
    import numpy as np

    numbers = present(values)
    if not numbers:
        return [math.nan] * len(shares)
    return [float(found) for found in np.percentile(numbers, shares)]
