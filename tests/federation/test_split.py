from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrove.federation.split import Parts, apportion, split
from fedgrove.ground.errors import DataError

Rows = Callable[..., list[dict[str, Any]]]


def labelled(labels: str) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def texts(part: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in part]


def counts(part: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["label"] for row in part))


@given(
    st.text("abcd", min_size=3, max_size=60),
    st.floats(0.01, 0.99),
    st.sampled_from([0.0, 0.2, 0.9]),
    st.none() | st.integers(1, 20),
    st.integers(0, 99),
)
def test_parts_are_disjoint_and_none_is_empty(
    labels: str, test_fraction: float, validation_fraction: float, cap: int | None, seed: int
) -> None:
    rows = labelled(labels)
    options: dict[str, Any] = {
        "test_fraction": test_fraction,
        "validation_fraction": validation_fraction,
    }
    whole = split("c", rows, seed=seed, **options)
    assert sorted(texts(whole.train) + texts(whole.test) + texts(whole.validation)) == sorted(
        texts(rows)
    )
    assert whole.train
    assert whole.test
    assert bool(whole.validation) == (validation_fraction > 0)

    capped = split("c", rows, seed=seed, **options, train_examples=cap, test_examples=cap)
    assert set(texts(capped.train)) <= set(texts(whole.train))
    assert len(capped.train) == min(cap or 60, len(whole.train))
    assert len(capped.test) == min(cap or 60, len(whole.test))
    assert capped.validation == whole.validation
    if cap and cap >= 4:
        assert set(counts(capped.train)) == set(counts(whole.train))


@given(st.text("abcd", min_size=8, max_size=60), st.integers(0, 99))
def test_every_label_keeps_a_row_for_training(labels: str, seed: int) -> None:
    assert set(counts(split("c", labelled(labels), seed=seed, test_fraction=0.25).train)) == set(
        labels
    )


def test_the_split_is_by_label_and_seeded(rows: Rows) -> None:
    data = labelled("a" * 40 + "b" * 20 + "c")
    parts = split("c", data, seed=0, test_fraction=0.25, validation_fraction=0.1)
    assert counts(parts.test) == {"a": 10, "b": 5}
    assert counts(parts.validation) == {"a": 4, "b": 2}
    assert counts(parts.train) == {"a": 26, "b": 13, "c": 1}
    assert split("c", data, seed=0, test_fraction=0.25, validation_fraction=0.1) == parts
    assert split("c", data, seed=1, test_fraction=0.25, validation_fraction=0.1) != parts
    assert split("d", data, seed=0, test_fraction=0.25, validation_fraction=0.1) != parts


def test_a_cap_keeps_the_proportions_and_every_label() -> None:
    parts = split(
        "c",
        labelled("a" * 800 + "b" * 199 + "c"),
        seed=0,
        test_fraction=0.2,
        train_examples=10,
        test_examples=5,
    )
    assert counts(parts.train) == {"a": 7, "b": 2, "c": 1}
    assert counts(parts.test) == {"a": 4, "b": 1}


def test_two_rows_are_enough_and_one_is_not() -> None:
    parts = split("c", labelled("ab"), seed=0, test_fraction=0.25)
    assert (len(parts.train), len(parts.test)) == (1, 1)
    with pytest.raises(
        DataError,
        match="the client 'clinic-1' has 1 row and needs at least 2 for training and test; give",
    ):
        split("clinic-1", labelled("a"), seed=0, test_fraction=0.25)
    with pytest.raises(
        DataError, match="has 2 rows and needs at least 3 for training, test and validation"
    ):
        split("clinic-1", labelled("ab"), seed=0, test_fraction=0.25, validation_fraction=0.1)
    with pytest.raises(DataError, match="has 0 rows"):
        split("clinic-1", [], seed=0, test_fraction=0.25)


def test_a_single_row_of_a_label_is_not_taken_even_by_a_large_test() -> None:
    parts = split("c", labelled("aaaaaab"), seed=0, test_fraction=0.75)
    assert (counts(parts.test), counts(parts.train)) == ({"a": 5}, {"a": 1, "b": 1})
    parts = split("c", labelled("aaaaaaab"), seed=0, test_fraction=0.1, validation_fraction=0.65)
    assert (counts(parts.validation), counts(parts.train)) == ({"a": 5}, {"a": 1, "b": 1})


def test_rows_keep_their_order() -> None:
    parts = split("c", labelled("abcabcabcabc"), seed=0, test_fraction=0.5)
    assert isinstance(parts, Parts)
    for part in (parts.train, parts.test):
        assert [int(text.split()[1]) for text in texts(part)] == sorted(
            int(text.split()[1]) for text in texts(part)
        )


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=1), st.integers(1, 30), min_size=1),
    st.floats(0, 1),
)
def test_apportioning_follows_the_counts(sizes: dict[str, int], share: float) -> None:
    size = int(share * sum(sizes.values()))
    shares = apportion(sizes, size)
    assert sum(shares.values()) == size
    for label, count in sizes.items():
        assert abs(shares[label] - count * size / sum(sizes.values())) < 1


def test_apportioning_leaves_or_covers() -> None:
    assert apportion({"a": 1, "b": 3}, 2, leave=1) == {"a": 0, "b": 2}
    assert apportion({"a": 1, "b": 1}, 1, leave=1) == {"a": 1, "b": 0}  # no other way
    assert apportion({"a": 100, "b": 1}, 10) == {"a": 10, "b": 0}
    assert apportion({"a": 100, "b": 1}, 10, cover=True) == {"a": 9, "b": 1}
    assert apportion({"a": 1, "b": 100}, 1, cover=True) == {"a": 0, "b": 1}
