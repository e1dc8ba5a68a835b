"""Answers in texts: how rows give them, how long texts are read, what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rows import save_rows, task_job
from tests.tiny import save_bert
from torch.nn import functional as F
from transformers import AutoTokenizer

import fedgrove as fg
from fedgrove.federation.answers import checked_answers, normalised, overlap
from fedgrove.federation.tasks.labels import Labels
from fedgrove.federation.tasks.reward import Reward
from fedgrove.federation.tasks.spans import LONGEST, NOWHERE, Spans
from fedgrove.ground.errors import DataError
from fedgrove.use.questions import questions, with_beside

TEXT = "the good day was very bad and the film was good"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(str(save_bert(tmp_path_factory.mktemp("bert"))))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("day", [[9, 12]]),
        ([{"text": "good", "start": 4}], [[4, 8]]),
        ('[{"text": "good", "answer_start": 43}]', [[43, 47]]),
        ({"text": ["good", "very bad"], "answer_start": [4, 17]}, [[4, 8], [17, 25]]),
        ([{"start": 3, "end": 9}], [[4, 8]]),
        (["very bad", "day"], [[17, 25], [9, 12]]),
        ([{"text": "good", "start": 4}, {"text": "good", "start": 4}], [[4, 8]]),
        ({"text": [], "answer_start": []}, []),
        ("", []),
        (float("nan"), []),
    ],
)
def test_how_answers_are_written(value: Any, found: list[list[int]]) -> None:
    assert checked_answers(value, TEXT, "answers", "f, row 1") == found


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("night", "the answer 'night' .* does not stand in the text"),
        ("good", "stands 2 times in the text; say which"),
        ([{"text": "good", "start": 5}], "at 5 the text has 'ood ', not the answer 'good'"),
        ([{"text": "good", "start": 400}], "400 to 404 is not in the text, which has 47"),
        ([{"start": -1, "end": 3}], "is not in the text"),
        ([{"start": 9, "end": 4}], "is not in the text"),
        ([{"start": 3, "end": 4}], "3 to 4 is empty"),
        ([{"start": 3, "end": 3}], "3 to 3 is empty"),
        ([" "], "an answer is empty"),
        ([{"text": "good", "start": float("nan")}], "start is nan, not a place"),
        ([{"text": "good", "start": "4"}], "start is '4', not a place"),
        ([{"text": "good", "start": 4.5}], "start is 4.5, not a place"),
        ([{"text": 3, "start": 4}], "text is 3, not a text"),
        ([{"start": 4}], "end is None, not a place"),
        ({"text": ["good"], "answer_start": []}, "text and answer_start that do not fit"),
        (7, "has 7, which is no answer"),
        ([7], "has 7, which is no answer"),
    ],
)
def test_answers_that_are_none_are_refused_by_row(value: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"^f, row 1: .*{words}"):
        checked_answers(value, TEXT, "answers", "f, row 1")


def test_measures_are_squads() -> None:
    """Worked by hand after the official script's rules."""
    assert normalised("The  Eiffel Tower!") == "eiffel tower"
    assert overlap("the Eiffel tower", ["Eiffel Tower"]) == {"exact_match": 1.0, "answer_f1": 1.0}
    found = overlap("in the old tower", ["Eiffel Tower", "old house"])
    assert found["exact_match"] == 0.0
    assert found["answer_f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert overlap("", []) == {"exact_match": 1.0, "answer_f1": 1.0}
    assert overlap("tower", []) == {"exact_match": 0.0, "answer_f1": 0.0}
    assert overlap("good good day", ["good"])["answer_f1"] == pytest.approx(2 * 1 / (3 + 1))


def encoded(task: Spans, tokenizer: Any, answers: Any = None) -> list[dict[str, Any]]:
    row = {"question": "what was it", "context": TEXT}
    return task.encode([row if answers is None else {**row, "answers": answers}], tokenizer)


def test_a_long_text_is_read_in_windows_that_overlap(tokenizer: Any) -> None:
    task = Spans(max_length=12, stride=2)  # six tokens of the text in each
    windows = encoded(task, tokenizer, [[17, 25]])
    seen = [[TEXT[a:b] for a, b in each["offsets"] if a < b] for each in windows]
    assert seen[0] == ["the", "good", "day", "was", "very", "bad"]
    assert seen[1] == ["very", "bad", "and", "the", "film", "was"]
    assert seen[2] == ["film", "was", "good"]
    assert {id(each["asked"]) for each in windows} == {id(windows[0]["asked"])}
    for window, own in zip(windows, seen, strict=True):
        first, last = window["label"]
        if "bad" not in own:
            assert (first, last) == (NOWHERE, NOWHERE)
            continue
        (start, _), (_, end) = window["offsets"][first], window["offsets"][last]
        assert TEXT[start:end] == "very bad"


def test_an_answer_that_a_window_cuts_is_not_in_it(tokenizer: Any) -> None:
    windows = encoded(Spans(max_length=12, stride=2), tokenizer, [[9, 29]])
    assert [each["label"] for each in windows] == [(0, 0)] * 3


def test_the_loss_is_that_of_starts_and_ends_whatever_the_padding(tokenizer: Any) -> None:
    task = Spans(max_length=12, stride=2)
    windows = encoded(task, tokenizer, [[17, 25]])
    batch = task.collate(windows, 0)
    logits = torch.randn(len(windows), batch["input_ids"].shape[1], 2, dtype=torch.float64)
    due = []
    for row, window in zip(logits, windows, strict=True):
        own = row[: len(window["input_ids"])]
        for side, place in enumerate(window["label"]):
            due.append(F.cross_entropy(own[None, :, side], torch.tensor([place])))
    assert torch.allclose(task.loss(logits, batch), torch.stack(due).mean())
    sums = task.score(logits, batch)
    assert sums["loss"] / sums["windows"] == pytest.approx(float(torch.stack(due).mean()))


@pytest.mark.parametrize("unanswerable", [False, True])
def test_the_answer_is_the_best_span_of_all_windows(tokenizer: Any, unanswerable: bool) -> None:
    """Beside a search through every span of every window."""
    task = Spans(max_length=12, stride=2, unanswerable=unanswerable)
    for seed in range(20):
        windows = encoded(task, tokenizer)
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(len(windows), 12, 2, generator=draw, dtype=torch.float64)
        spans: dict[tuple[int, int], float] = {}
        weights: list[list[float]] = [[], []]
        for row, window in zip(logits.tolist(), windows, strict=True):
            inside = [n for n, (a, b) in enumerate(window["offsets"]) if a < b]
            for side in (0, 1):
                weights[side] += [row[n][side] for n in ([0, *inside] if unanswerable else inside)]
            for first in inside:
                for last in inside:
                    if first <= last < first + LONGEST:
                        where = (window["offsets"][first][0], window["offsets"][last][1])
                        value = row[first][0] + row[last][1]
                        spans[where] = max(value, spans.get(where, value))
        where, value = max(spans.items(), key=lambda pair: pair[1])
        nothing = min(row[0][0] + row[0][1] for row in logits.tolist())
        if unanswerable and nothing >= value:
            where, value = (0, 0), nothing
        total = sum(float(torch.tensor(side, dtype=torch.float64).logsumexp(0)) for side in weights)
        (answer,) = task.told_of(logits, windows)
        assert (answer["start"], answer["end"]) == where
        assert answer["answer"] == TEXT[where[0] : where[1]]
        score = float(torch.tensor(value - total).exp())
        assert answer["score"] == pytest.approx(score, abs=1e-4)


def test_answers_count_once_a_question(tokenizer: Any) -> None:
    task = Spans(max_length=12, stride=2)
    rows = [
        {"question": "what was it", "context": TEXT, "answers": [[17, 25], [17, 21]]},
        {"question": "what was it", "context": "the day", "answers": [[4, 7]]},
    ]
    windows = task.encode(rows, tokenizer)
    assert len(windows) == 4
    logits = [torch.zeros(len(each["input_ids"]), 2) for each in windows]
    first, last = windows[0]["label"]
    logits[0][first, 0] = logits[0][last, 1] = 9.0
    logits[3][5:7] = 9.0  # "the day": both tokens alike, so that the first span is "the"
    sums = task.judged(logits, windows)
    assert sums == {"exact_match": 1.0, "answer_f1": 1.0, "examples": 2.0}
    measures = task.measure({**sums, "loss": 8.0, "windows": 4.0})
    assert measures == {"loss": 2.0, "answer_f1": 0.5, "exact_match": 0.5, "examples": 2.0}


def test_a_question_that_leaves_no_room(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 1 has a question of 5 tokens, .* data\.stride = 6"):
        encoded(Spans(max_length=12, stride=6), tokenizer)


def test_questions_need_their_text(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"question 1 is no object with 'question' and 'context'"):
        questions(Spans(), ["what was it"])
    with pytest.raises(DataError, match="question 1: the column 'context' is empty"):
        questions(Spans(), [{"question": "what", "context": " "}])


def test_what_a_command_puts_beside_its_texts() -> None:
    context, between = {"context": TEXT}, {"chosen": "good", "rejected": "bad"}
    assert with_beside(Labels, ["a"], {}) == ["a"]
    assert with_beside(Spans, ["a"], context) == [{"question": "a", "context": TEXT}]
    assert with_beside(Reward, ["a"], between) == [{"prompt": "a", **between}]
    with pytest.raises(DataError, match=r"'labels' is not asked with 'context': --context is for"):
        with_beside(Labels, ["a"], context)
    with pytest.raises(DataError, match=r"'spans' is not asked with 'chosen' and 'rejected'"):
        with_beside(Spans, ["a"], between)
    with pytest.raises(DataError, match=r"prompt 1 is no object with 'prompt', 'chosen' and"):
        questions(Reward(), ["a"])


def test_rows_without_an_answer(tiny_bert: Path, tmp_path: Path) -> None:
    folder = save_rows(tmp_path / "silos")
    line = {"text": "the day", "question": "what was it", "answers": []}
    with (folder / "site-0.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    with pytest.raises(
        DataError, match=r"site-0\.jsonl, line 25 has no answer in the column 'answers'"
    ):
        fg.run(task_job(tiny_bert, folder, "spans"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    job = task_job(tiny_bert, folder, "spans", data={"unanswerable": True}, run={"rounds": 1})
    result = fg.run(job, tmp_path / "run")
    model = result.client("site-0").model()
    rows = [{"question": "what was it", "context": "the day", "answers": []}]
    assert model.evaluate(rows)["examples"] == 1.0
