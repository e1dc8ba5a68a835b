"""Rows of tasks that are not there are told so in one sentence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedgrove.federation import build
from fedgrove.federation.otherwise import SEVERAL, are_measures, is_list
from fedgrove.federation.tasks import TASKS, ClassifyText
from fedgrove.ground.errors import DataError
from fedgrove.job import Job

MakeJob = Callable[..., Job]
WriteRows = Callable[[Path, list[dict[str, Any]]], Path]
GENERATE = ["data.task=generate"]
NOT_YET = "is another task, which Fedgrove does not have yet"
LEARNT = (
    'learnt with data.task = "labels"',
    'learnt with data.task = "spans"',
    'learnt with data.task = "tokens"',
    'learnt with data.task = "prefer" or "reward"',
)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    TASKS.forget()


@pytest.fixture
def built(make_job: MakeJob, write_rows: WriteRows, tmp_path: Path) -> Callable[..., Any]:
    def read(rows: list[dict[str, Any]], *settings: str) -> Any:
        write_rows(tmp_path / "silos" / "a.jsonl", rows)
        return build(make_job("data.source=silos", f"data.path='{tmp_path / 'silos'}'", *settings))

    return read


@pytest.mark.parametrize(
    ("row", "settings", "sentence"),
    [
        (
            {"text": "a", "label": ["x", "y"]},
            [],
            r"line 1: the column 'label' holds a list: several",
        ),
        ({"text": "a", "label": "[1, 0]"}, [], "holds a list: several labels for one row"),
        ({"text": "a", "label": {"x": 1}}, [], "holds a list: several labels for one row"),
        (
            {"text": ["a", "b"], "label": "x"},
            [],
            "a list of words, not a text: a tag for each word",
        ),
        ({"tokens": ["a"], "ner_tags": [0]}, [], r"it has: tokens, ner_tags: a tag for each word"),
        ({"context": "a", "question": "b", "answers": {}}, [], "an answer that stands in a text"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            GENERATE,
            "a preference between two answ",
        ),
    ],
)
def test_rows_of_other_tasks(
    built: Callable[..., Any], row: dict[str, Any], settings: list[str], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence) as error:
        built([row] * 4, *settings)
    assert str(error.value).endswith((NOT_YET, *LEARNT))
    assert "\n" not in str(error.value)


def test_numbers_to_predict(built: Callable[..., Any]) -> None:
    draw = random.Random(0)
    rows = [{"text": f"note {i}", "label": round(draw.random() * 5, 2)} for i in range(40)]
    with pytest.raises(
        DataError, match=r'different numbers in 40 rows, .* learnt with data.task = "regression"'
    ):
        built(rows)
    stars = [{"text": f"note {i}", "label": 1 + i % 9 / 2} for i in range(40)]
    assert len(built(stars).labels) == 9
    codes = [{"text": f"note {i}", "label": i % 30} for i in range(60)]
    assert len(built(codes, "data.test_fraction=0.1").labels) == 30


def test_a_task_that_learns_them_is_named(built: Callable[..., Any]) -> None:
    @TASKS.register
    class Several(ClassifyText):
        name: ClassVar[str] = "several"
        suits: ClassVar[tuple[str, ...]] = (SEVERAL,)

    with pytest.raises(
        DataError,
        match=r'several labels for one row is learnt with data.task = "labels" or "several"',
    ):
        built([{"text": "a", "label": ["x"]}] * 4)


def test_what_looks_like_a_list_or_a_quantity() -> None:
    assert all(map(is_list, ([1], "[1, 0]", "['a']", {"a": 1})))
    assert not any(map(is_list, ("a [b] c", "[OK]", "x", 3, True)))
    assert not are_measures({str(i) for i in range(50)}, 60)
    assert are_measures({str(i / 7) for i in range(50)}, 60)
    assert not are_measures({str(i / 7) for i in range(50)}, 600)
