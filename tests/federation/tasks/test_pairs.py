"""Rows that are two answers: as public sets write them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from fedgrove.federation.tasks.pairs import PairOptions, Pairs, cut, pair_in
from fedgrove.ground.errors import DataError

PLAIN = PairOptions()
WHOLE = PairOptions(whole=True)
ASKED = {"role": "user", "content": "why?"}
SYSTEM = {"role": "system", "content": "be kind"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(data: PairOptions = PLAIN, **values: Any) -> dict[str, Any]:
    found: dict[str, Any] = Pairs.row(values, data, "pairs.jsonl, line 3")
    return found


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (PLAIN, {"prompt": "why?", "chosen": "so", "rejected": "no"}),
        (PLAIN, {"prompt": [ASKED], "chosen": [said("so")], "rejected": [said("no")]}),
        (PLAIN, {"prompt": "why?", "chosen": [ASKED, said("so")], "rejected": [ASKED, said("no")]}),
        (
            PLAIN,
            {
                "prompt": json.dumps([ASKED]),
                "chosen": json.dumps([said("so")]),
                "rejected": json.dumps([{"from": "gpt", "value": "no"}]),
            },
        ),
        (WHOLE, {"chosen": [ASKED, said("so")], "rejected": [ASKED, said("no")]}),
        (
            WHOLE,
            {
                "chosen": "\n\nHuman: why?\n\nAssistant: so",
                "rejected": "\n\nHuman: why?\n\nAssistant: no",
            },
        ),
    ],
    ids=["texts", "messages", "with the prompt", "JSON", "whole", "turns"],
)
def test_one_pair_in_many_spellings(data: PairOptions, values: dict[str, Any]) -> None:
    expected = {"prompt": "why?", "chosen": "so", "rejected": "no", "label": ""}
    assert row(data, **values) == expected
    assert pair_in(row(data, **values), 1).row() == expected


def test_longer_conversations_keep_their_turns() -> None:
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    found = row(WHOLE, chosen=turns + "d", rejected=turns + "Human: is a word here")
    assert [each["role"] for each in found["prompt"]] == ["user", "assistant", "user"]
    assert found["rejected"] == "Human: is a word here"
    again = row(prompt="why?", chosen=[SYSTEM, ASKED, said("so")], rejected="no")
    assert again["prompt"] == [SYSTEM, ASKED], "the system's message is read"
    code = row(prompt="why?", chosen='[{"a": 1}]', rejected="no")
    assert code["chosen"] == '[{"a": 1}]', "JSON that is no conversation is an answer"


@pytest.mark.parametrize(
    ("data", "values", "sentence"),
    [
        (PLAIN, {"prompt": "why?", "chosen": "so ", "rejected": "so"}, "are the same answer"),
        (PLAIN, {"prompt": "why?", "chosen": "", "rejected": "no"}, "'chosen' is empty"),
        (PLAIN, {"prompt": "why?", "chosen": "so", "rejected": None}, "'rejected' is empty"),
        (PLAIN, {"prompt": " ", "chosen": "so", "rejected": "no"}, "'prompt' is empty"),
        (PLAIN, {"prompt": "why?", "chosen": 3, "rejected": "no"}, "is a int, not a text"),
        (
            PLAIN,
            {"prompt": "who?", "chosen": [ASKED, said("so")], "rejected": "no"},
            "begins with another prompt",
        ),
        (
            WHOLE,
            {"chosen": [ASKED, said("so")], "rejected": [SYSTEM, ASKED, said("no")]},
            "differ before their last answers",
        ),
        (WHOLE, {"chosen": "so", "rejected": "no"}, "is no conversation"),
        (WHOLE, {"chosen": [ASKED], "rejected": [ASKED, said("no")]}, "must be the assistant's"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_row(
    data: PairOptions, values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 3.*{sentence}"):
        row(data, **values)


@pytest.mark.parametrize(
    ("better", "worse", "sentence"),
    [
        (4, 4, "a tie, so neither is preferred"),
        (3, "4", r"rated 3 \(up\), the other 4"),
        (4, None, "'down' is None, not a finite number"),
        ("nan", 4, "not a finite number"),
    ],
)
def test_ratings_that_tie_or_contradict_are_refused(better: Any, worse: Any, sentence: str) -> None:
    data = PairOptions(ratings=("up", "down"))
    values = {"prompt": "why?", "chosen": "so", "rejected": "no", "up": better, "down": worse}
    with pytest.raises(DataError, match=rf"line 3.*{sentence}"):
        row(data, **values)
    assert row(data, **{**values, "up": 5, "down": 1})["chosen"] == "so"
    assert Pairs.question(values, data, "here")["rejected"] == "no", "asked without ratings"


def test_options_that_name_one_column_twice_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"names .a. twice"):
        PairOptions(chosen="a", rejected="a")
    with pytest.raises(ValidationError, match="name two columns"):
        PairOptions(ratings=("a",))


def test_both_answers_lose_the_same_of_their_prompt() -> None:
    kept, (better, worse) = cut(range(10), ([50, 51], [60, 61, 62]), 8)
    assert kept == 5
    assert list(better) == [5, 6, 7, 8, 9, 50, 51]
    assert list(worse) == [5, 6, 7, 8, 9, 60, 61, 62]
    kept, (better, _) = cut(range(10), ([50] * 9, [60]), 8)
    assert kept == 4
    assert list(better) == [6, 7, 8, 9, 50, 50, 50, 50], "then an answer loses its end"
