"""The made-up notes: the same for everybody, and what they say of themselves is true."""

from __future__ import annotations

from fedgrove.federation.notes import CLINICS, EACH, notes


def test_they_are_the_same_each_time_and_sound() -> None:
    found = list(notes())
    assert found == list(notes())
    assert len(found) == len(CLINICS) * EACH
    kinds = set()
    for note in found:
        for span in note["spans"]:
            words = note["text"][span["start"] : span["end"]]
            assert words == words.strip() != ""
            kinds.add(span["label"])
        assert 0 <= note["urgency"] <= 10
        assert "{" not in note["text"]
    assert kinds == {"SYMPTOM", "DRUG", "DOSE"}
    assert any(not note["topics"] for note in found)
