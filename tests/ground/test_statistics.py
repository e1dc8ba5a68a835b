from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrove.ground.statistics import mean, percentiles, present, std, tail10


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_statistics_are_those_of_numpy(values: list[float]) -> None:
    assert mean(values) == pytest.approx(np.mean(values), abs=1e-12)
    assert std(values) == pytest.approx(np.std(values), abs=1e-9)
    assert tail10(values) == np.percentile(values, 10, method="linear")
    assert mean(reversed(values)) == mean(values)  # the order of clients does not show
    assert tail10([*values, None, math.nan]) == tail10(values)
    wanted = [min(values), np.median(values), max(values)]
    assert percentiles(values, [0, 50, 100]) == pytest.approx(wanted)


def test_without_a_number_there_is_no_statistic() -> None:
    nothing = [None, math.nan]
    assert present(nothing) == []
    found = [mean(nothing), std(nothing), tail10(nothing), *percentiles(nothing, [5, 95])]
    assert len(found) == 5
    assert all(math.isnan(each) for each in found)
