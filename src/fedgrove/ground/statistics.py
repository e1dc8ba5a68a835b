"""Statistics over clients, the same in a run's summary, its report, a comparison and the display.

``tail10`` is the 10th-percentile client, ``numpy.percentile(values, 10)`` with linear interpolation
between order statistics; ``std`` is over the whole population (``ddof=0``). Missing values
(``None``, NaN) are left out; with none left the result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Value = float | int | None

RESAMPLES = 10_000  # of a bootstrap, at most
_DRAWS = 30_000_000  # in all resamples: above 3,000 numbers there are fewer, but never below 1,000
_BATCH = 2_000_000  # draws in memory at a time


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


def interval(
    values: NDArray[np.float64],
    level: float,
    seed: int,
) -> tuple[float, float]:
    """Of the mean of ``[n]`` numbers, by the percentile bootstrap."""
    import numpy as np
    from scipy.stats import bootstrap

    count = len(values)
    if np.ptp(values) == 0:  # one number, or all alike: every resample has the same mean
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=min(RESAMPLES, max(1000, _DRAWS // count)),
        batch=max(1, _BATCH // count),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
