from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fedgrove.federation.assets import asset
from fedgrove.federation.embedded import DOMAINS, nlu_tasks, sentiment
from fedgrove.ground.errors import DataError


def test_ratings_become_classes_and_repetitions_go(tmp_path: Path) -> None:
    for file in DOMAINS:
        (tmp_path / file).write_text("", encoding="utf-8")
    (tmp_path / "tweets_GroundTruth.txt").write_bytes(
        "1\t-0.51\tbad &amp; sad\r\n2\t-0.5\tso \xa0 "
        "so\r\n3\t0.5\tfine\r\n4\t0.51\tgood\r\n".encode()
    )
    (tmp_path / "nytEditorialSnippets_GroundTruth.txt").write_text(
        "1_1\t3\tso so\n1_2\t4\tgreat", encoding="utf-8"
    )
    assert sentiment(tmp_path) == [
        {"text": "bad & sad", "label": "negative", "domain": "tweets"},
        {"text": "so so", "label": "neutral", "domain": "tweets"},
        {"text": "fine", "label": "neutral", "domain": "tweets"},
        {"text": "good", "label": "positive", "domain": "tweets"},
        {"text": "great", "label": "positive", "domain": "nyt"},
    ]


def test_the_real_set_has_its_published_sizes() -> None:
    try:
        folder = asset("sentiment")
    except DataError as error:
        pytest.skip(str(error))
    rows = sentiment(folder)
    published = {"tweets": 4200, "amazon": 3708, "films": 10605, "nyt": 5190}  # with repetitions
    for domain, count in Counter(row["domain"] for row in rows).items():
        assert 0.98 * published[domain] <= count <= published[domain]
    assert len({row["text"] for row in rows}) == len(rows)
    assert set(Counter(row["label"] for row in rows)) == {"negative", "neutral", "positive"}


def test_four_tasks_become_one_table(tmp_path: Path) -> None:
    def write(name: str, *examples: tuple[str, dict[str, int]]) -> None:
        rows = [{"input": text, "target_scores": scores} for text, scores in examples]
        (tmp_path / f"{name}.json").write_text(json.dumps({"examples": rows}), encoding="utf-8")

    neither = {"True": 0, "False": 0, "Neither": 1}
    write(
        "evidence",
        ("Moon: it is round .\nClaim: It is square .", neither),
        ("A: b\nClaim: c", {"True": 1, "False": 0}),
    )
    claim = (
        "On June 2017, the following claim was made: Cats fly.\nQ: Was this claim true or false?"
    )
    write("claims", (claim, {"true": 0, "false": 1}), (claim, {"true": 0, "false": 1}))
    write("hotels", ("Nice  room", {"positive": 1, "negative": 0}))
    write("medicine", ("Nice room", {"positive": 0, "negative": 1}))
    assert nlu_tasks(tmp_path) == [
        {
            "text": "Moon: it is round .",
            "pair": "It is square .",
            "label": "not enough evidence",
            "task": "evidence",
        },
        {"text": "A: b", "pair": "c", "label": "supported", "task": "evidence"},
        {"text": "Cats fly.", "pair": "", "label": "false", "task": "claims"},
        {"text": "Nice room", "pair": "", "label": "positive", "task": "hotels"},
        {"text": "Nice room", "pair": "", "label": "negative", "task": "medicine"},
    ]
