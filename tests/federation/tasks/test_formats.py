"""Generation out of rows as people have them: templates, ShareGPT, parts, every answer, plain text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_llama, sentences, tiny_job
from transformers import AutoTokenizer

import fedgrove as fg
from fedgrove.federation import build
from fedgrove.federation.tasks.generate import IGNORED, Generate
from fedgrove.ground.errors import DataError, JobError
from fedgrove.job import Job

MakeJob = Callable[..., Job]
WriteRows = Callable[[Path, list[dict[str, Any]]], Path]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def chat(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(tiny_llama))


@pytest.fixture
def learnt(make_job: MakeJob, write_rows: WriteRows, tmp_path: Path) -> Callable[..., Rows]:
    """The rows that a job with these settings reads out of raw ones."""

    def read(raw: Rows, *settings: str) -> Rows:
        write_rows(tmp_path / "silos" / "a.jsonl", raw)
        job = make_job(
            "data.task=generate",
            "data.source=silos",
            f"data.path='{tmp_path / 'silos'}'",
            *settings,
        )
        (client,) = build(job).clients
        return [*client.train, *client.test]

    return read


# ------------------------------------------------------------------------ templates

ALPACA = [
    {"instruction": "Say how", "input": "ward 3", "output": "calm"},
    {"instruction": "Say when", "input": "", "output": "now"},
    {"instruction": "Say where", "input": None, "output": "here"},
]


def test_a_prompt_of_several_columns(learnt: Callable[..., Rows]) -> None:
    rows = learnt(
        ALPACA, r'data.template="{instruction}\n\nInput: {input}"', "data.completion=output"
    )
    assert {row["prompt"]: row["completion"] for row in rows} == {
        "Say how\n\nInput: ward 3": "calm",
        "Say when": "now",
        "Say where": "here",
    }


def test_numbers_and_braces_in_a_template(learnt: Callable[..., Rows]) -> None:
    raw = [{"a": 3, "b": 0.5, "completion": "x"}, {"a": 4, "b": 1.5, "completion": "y"}]
    rows = learnt(raw, 'data.template="{{{a}}} and {b}"')
    assert {row["prompt"] for row in rows} == {"{3} and 0.5", "{4} and 1.5"}


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("say it", "it names no column; write one in braces"),
        ("say {}", "it names no column; write one in braces"),
        ("say {it", "its braces do not fit"),
    ],
)
def test_templates_that_are_none(make_job: MakeJob, template: str, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        make_job("data.task=generate", f"data.template='{template}'")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["template={a}", "prompt=q"], r'data.prompt = "q" has no use with data.template'),
        (["messages=m", "template={a}"], r'data.template = "{a}" has no use with data.messages'),
        (["plain=t", "messages=m"], r'data.plain = "t" has no use with data.messages = "m"'),
        (["plain=t", "completion=m"], r'data.completion = "m" has no use with data.plain'),
        (["answers=every"], r'data.answers = "every" has no use without data.messages'),
    ],
)
def test_keys_that_say_nothing_together(
    make_job: MakeJob, settings: list[str], sentence: str
) -> None:
    with pytest.raises(JobError, match=sentence):
        make_job("data.task=generate", *(f"data.{setting}" for setting in settings))


@pytest.mark.parametrize(
    ("raw", "settings", "sentence"),
    [
        (ALPACA, [], r'set data.template = "{instruction}\\n\\n{input}" and data.completion = "o'),
        ([{"conversations": []}], [], r'set data.messages = "conversations" to learn'),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            [],
            r'a preference between two answers is learnt with data.task = "prefer" or "reward"',
        ),
        ([{"text": "a"}], [], r'set data.plain = "text" to learn plain texts'),
        ([{"a": [1], "completion": "x"}], ["data.template={a}"], r"'a' is a list, not a text"),
        (
            [{"a": "", "completion": "x"}],
            ["data.template={a}"],
            r"all columns of data.template are",
        ),
    ],
)
def test_rows_of_another_kind_get_a_hint(
    learnt: Callable[..., Rows], raw: Rows, settings: list[str], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        learnt(raw, *settings)


# ------------------------------------------------------------------------ conversations


def test_both_spellings_and_parts_are_one_conversation(learnt: Callable[..., Rows]) -> None:
    shared = [
        {"from": "system", "value": "very happy"},
        {"from": "human", "value": "what is good"},
        {"from": "gpt", "value": "it was fine"},
    ]
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "very happy"}]},
        {"role": "user", "content": [{"type": "text", "text": "what is "}, "good"]},
        {"role": "assistant", "content": [{"type": "text", "text": "it was fine"}]},
    ]
    one, other = learnt(
        [{"conversations": shared}, {"conversations": parts}], "data.messages=conversations"
    )
    assert one == other
    assert one["messages"] == [
        {"role": "system", "content": "very happy"},
        {"role": "user", "content": "what is good"},
        {"role": "assistant", "content": "it was fine"},
    ]


TURNS = [
    {"role": "user", "content": "what is good"},
    {"role": "assistant", "content": "it was fine"},
    {"role": "user", "content": "what is not good"},
    {"role": "assistant", "content": "it was bad"},
]


def test_every_answer_is_learnt(chat: Any) -> None:
    task = Generate(max_length=64, answers="every")
    last = Generate(max_length=64)
    row = {"messages": TURNS, "label": ""}
    batch = task.collate(task.encode([row], chat), 0)
    assert (
        batch["input_ids"].tolist()
        == last.collate(last.encode([row], chat), 0)["input_ids"].tolist()
    )
    words = chat.decode(batch["labels"][batch["labels"] != IGNORED])
    assert words == "it was fine <|end|> it was bad <|end|>"
    (example,) = task.encode([row], chat)
    assert chat.decode(example["prompt_ids"]).endswith("what is not good <|end|> <|assistant|>")
    assert example["references"] == ["it was bad"]
    asked = task.positions(batch)[0].nonzero().flatten().tolist()
    starts = [position + 1 for position in asked]
    assert starts == [i for i, label in enumerate(batch["labels"][0].tolist()) if label != IGNORED]


def test_a_long_conversation_loses_its_end_where_every_answer_counts(chat: Any) -> None:
    row = {"messages": TURNS, "label": ""}
    whole = Generate(max_length=64, answers="every").encode([row], chat)[0]
    first = whole["spans"][0]
    cut = Generate(max_length=first[1] + 2, answers="every").encode([row], chat)[0]
    assert cut["spans"] == [first]
    assert cut["input_ids"] == whole["input_ids"][: first[1] + 2]
    with pytest.raises(DataError, match=r"row 1 has its first answer after data\.max_length = 4"):
        Generate(max_length=4, answers="every").encode([row], chat)


def test_a_template_that_rewrites_earlier_answers_is_refused(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_llama))
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}<|{{ m['role'] }}|> "
        "{{ m['content'] }} <|end|> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    row = {"messages": TURNS, "label": ""}
    assert Generate(max_length=64).encode([row], tokenizer)
    with pytest.raises(DataError, match=r"rewrites earlier ones .* set data\.answers = \"last\""):
        Generate(max_length=64, answers="every").encode([row], tokenizer)


# ------------------------------------------------------------------------ plain texts


def test_of_a_plain_text_all_is_learnt(chat: Any) -> None:
    task = Generate(max_length=64, plain=True)
    row = {"plain": "the day was very good", "label": ""}
    batch = task.collate(task.encode([row], chat), 0)
    assert chat.decode(batch["input_ids"][0]) == "the day was very good <|end|>"
    assert batch["labels"].tolist() == [[IGNORED, *batch["input_ids"][0, 1:].tolist()]]
    (example,) = task.encode([row], chat)
    assert (example["prompt"], example["references"]) == ("the day was", ["very good"])
    assert task.lengths([row], chat) == [6]
    cut = Generate(max_length=4, plain=True).encode([row], chat)[0]
    assert chat.decode(cut["input_ids"]) == "the day was very"
    with pytest.raises(DataError, match=r"row 1 has a text of fewer than two tokens"):
        task.encode([{"plain": "day", "label": ""}], chat)


def test_a_model_that_goes_on_with_texts(tmp_path: Path, write_rows: WriteRows) -> None:
    model = save_llama(tmp_path / "llama", chat=False)
    for client in range(2):
        rows = [{"body": row["text"]} for row in sentences(20, client)]
        write_rows(tmp_path / "silos" / f"site-{client}.jsonl", rows)
    job = tiny_job(
        model,
        tmp_path / "silos",
        data={"task": "generate", "plain": "body", "max_new_tokens": 4},
        run={"rounds": 2},
    )
    result = fg.run(job, tmp_path / "out")
    site = result.client("site-0")
    written_lines = (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(row) for row in written_lines]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < losses[0]
    model_of_site = site.model()
    # a prompt is a text without an end, not a question in a template
    batch = model_of_site.kernel.task.encode(
        [{"prompt": "the day was"}], AutoTokenizer.from_pretrained(str(model))
    )
    assert len(batch[0]["input_ids"]) == 3
    (written,) = site.predict(["the day was"])
    assert isinstance(written, str)
    assert site.evaluate()["loss"] == pytest.approx(site.summary["loss"], rel=1e-5)
    assert torch.isfinite(model_of_site.logits(["the day was"])).all()


def test_a_card_tells_only_what_is_not_the_default() -> None:
    assert set(Generate().card()) == {
        "task",
        "labels",
        "max_length",
        "max_new_tokens",
        "generate_examples",
    }
    for task in (Generate(), Generate(answers="every"), Generate(plain=True)):
        assert Generate.from_card(task.card()) == task
