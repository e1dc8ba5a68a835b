"""Spellings of one label."""

from __future__ import annotations

import pytest

from fedgrove.federation.labels import class_among, classes_of, merged


@pytest.mark.parametrize(
    ("spellings", "classes"),
    [
        (["0", "1"], {"0": "0", "1": "1"}),
        (["0", "1", "0.0", "1.", "+1", "-0"], dict.fromkeys(["0", "0.0", "-0"], "0")
         | dict.fromkeys(["1", "1.", "+1"], "1")),
        (["0.0", "1.0"], {"0.0": "0.0", "1.0": "1.0"}),  # one spelling each: called by it
        (["true", "True", "FALSE"], {"true": "true", "True": "true", "FALSE": "FALSE"}),
        (["0", "1", "True", "false"], {"0": "0", "false": "0", "1": "1", "True": "1"}),
        (["0", "1", "true", "maybe"], {x: x for x in ("0", "1", "true", "maybe")}),
        (["0", "1", "2", "true"], {x: x for x in ("0", "1", "2", "true")}),
        (["1", "one", "01", "1.5", "1.50", "I"], {x: x for x in ("1", "one", "01", "1.5", "1.50", "I")}),
        (["-3", "-3.0", "3"], {"-3": "-3", "-3.0": "-3", "3": "3"}),
    ],
)  # fmt: skip
def test_what_is_one_class(spellings: list[str], classes: dict[str, str]) -> None:
    assert classes_of(spellings) == classes
    assert classes_of(reversed(spellings)) == classes


def test_what_was_merged() -> None:
    assert merged(classes_of(["0", "1", "1.0"])) == {"1": ["1", "1.0"]}
    assert merged(classes_of(["a", "b"])) == {}


@pytest.mark.parametrize(
    ("label", "known", "found"),
    [
        ("0", ["0", "1"], "0"),
        ("1.0", ["0", "1"], "1"),
        ("1", ["0.0", "1.0"], "1.0"),
        ("True", ["0", "1"], "1"),
        ("1", ["false", "true"], "true"),
        ("true", ["0", "1", "2"], None),
        ("2", ["0", "1"], None),
        ("Yes", ["yes", "no"], None),
    ],
)
def test_which_known_class_a_label_spells(label: str, known: list[str], found: str | None) -> None:
    assert class_among(label, known) == found
