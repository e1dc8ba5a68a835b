"""The made-up replies: the same for everybody, pairs all of them, and clinics that disagree."""

from __future__ import annotations

from fedgrove.federation.replies import CLINICS, EACH, replies
from fedgrove.federation.tasks.pairs import PairOptions, Pairs


def test_they_are_the_same_each_time_and_disagree_in_manner_alone() -> None:
    found = list(replies())
    assert found == list(replies())
    assert len(found) == len(CLINICS) * EACH
    for number, row in enumerate(found):
        read = Pairs.row(row, PairOptions(), f"row {number}")
        assert (read["chosen"], read["rejected"]) == (row["chosen"], row["rejected"])
        assert "{" not in row["prompt"] + row["chosen"] + row["rejected"]
        if row["about"] == "manner":
            brief = len(row["chosen"]) < len(row["rejected"])
            assert brief == (CLINICS[row["clinic"]] == "brief")
    assert {row["about"] for row in found} == {"manner", "matter"}
