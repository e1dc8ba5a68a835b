"""Spellings of one label."""

from __future__ import annotations

import pytest

from fedgrove.federation.labels import class_among, classes_of, doubtful, merged


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
        (["0", "0,0", "1,00", "1"], {"0": "0", "0,0": "0", "1": "1", "1,00": "1"}),
        (["1", "1,000", "1e0", "1E0"], {x: x for x in ("1", "1,000", "1e0", "1E0")}),
        (["1", "1.000e+00", "-2", "-2e+00", "1.5e+00"],
         {"1": "1", "1.000e+00": "1", "-2": "-2", "-2e+00": "-2", "1.5e+00": "1.5e+00"}),
        (["gr\u00fcn", "gru\u0308n"], {"gr\u00fcn": "gr\u00fcn", "gru\u0308n": "gr\u00fcn"}),
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
    ("classes", "said"),
    [
        (["a", "b", "1", "2.5", "Nan", "none"], ["'Nan' is a class like any other"]),
        (["1", "01"], ["The labels '01', '1' look alike and stay 2 classes"]),
        (["0.5", "0.50", "0,5", "1"], ["The labels '0,5', '0.5', '0.50' look alike and stay 3"]),
        (["'0'", "0", "\uff11", "1"], ["The labels \"'0'\", '0' look", "The labels '1', '\uff11' look"]),
        (["1e5", "100000"], ["The labels '100000', '1e5' look alike"]),
        (["1" * 30, "1" * 29 + "2"], []),
        (["E11.50", "E11.5", "inf", "infinity"], []),
        ([f"{n}.{z}" for n in range(5) for z in ("5", "50")], ["'0.5'", "'1.5'", "'2.5'", "So do 2 more"]),
    ],
)  # fmt: skip
def test_what_looks_like_a_slip_is_said(classes: list[str], said: list[str]) -> None:
    found = doubtful(classes)
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


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
