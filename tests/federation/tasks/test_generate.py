from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_llama
from torch.nn import functional as F

from fedgrove.federation import build
from fedgrove.federation.tasks.conversation import conversation
from fedgrove.federation.tasks.generate import IGNORED, Generate, Template
from fedgrove.ground.errors import DataError
from fedgrove.job import Job

WriteRows = Callable[[Path, list[dict[str, Any]]], Path]
MakeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def chat(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tiny_llama))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(save_llama(tmp_path_factory.mktemp("plain"), chat=False))
    )


ROW = {"prompt": "what is not good", "completion": "it was bad", "label": ""}


# ------------------------------------------------------------ tokens
def test_a_pair_is_written_by_the_chat_template_and_ends_with_its_end(chat: Any) -> None:
    example = Generate(max_length=64).encode([ROW], chat)[0]
    text = chat.decode(example["input_ids"])
    assert text == "<|user|> what is not good <|end|> <|assistant|> it was bad <|end|>"
    ((start, end),) = example["spans"]
    assert chat.decode(example["input_ids"][start:end]) == "it was bad <|end|>"
    assert example["prompt_ids"] == example["input_ids"][:start]
    assert (example["prompt"], example["references"]) == ("what is not good", ["it was bad"])


def test_without_a_chat_template_a_plain_one_is_used(plain: Any) -> None:
    example = Generate(max_length=64).encode([ROW], plain)[0]
    # the word tokenizer knows "###" and "Response" but not "Response:"
    expected = plain("### Instruction:\nwhat is not good\n\n### Response:\n")["input_ids"]
    assert example["prompt_ids"] == expected
    assert example["input_ids"] == [
        *expected,
        *plain("it was bad")["input_ids"],
        plain.eos_token_id,
    ]


def test_of_a_conversation_only_the_last_answer_is_learnt(chat: Any) -> None:
    messages = [
        {"role": "system", "content": "very happy"},
        {"role": "user", "content": "what is good"},
        {"role": "assistant", "content": "it was fine"},
        {"role": "user", "content": "what is not good"},
        {"role": "assistant", "content": "it was bad"},
    ]
    task = Generate(max_length=64)
    batch = task.collate(task.encode([{"messages": messages, "label": ""}], chat), 0)
    learnt = batch["labels"][batch["labels"] != IGNORED]
    assert chat.decode(learnt) == "it was bad <|end|>"
    assert "it was fine" in chat.decode(batch["input_ids"][0])


def test_labels_are_the_hand_made_mask(chat: Any) -> None:
    task = Generate(max_length=64)
    longer = {"prompt": "what is not happy", "completion": "it was very very sad", "label": ""}
    batch = task.collate(task.encode([ROW, longer], chat), 0)
    ids = chat.convert_tokens_to_ids
    end, x = ids("<|end|>"), IGNORED
    head = [x] * 7  # <|user|> what is not good <|end|> <|assistant|>
    assert batch["labels"].tolist() == [
        [*head, *ids(["it", "was", "bad"]), end, x, x],
        [*head, *ids(["it", "was", "very", "very", "sad"]), end],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 11 + [0] * 2, [1] * 13]
    assert batch["input_ids"][0, 11:].tolist() == [0, 0]
    asked = task.positions(batch)
    assert asked[0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert asked[1].nonzero().flatten().tolist() == [6, 7, 8, 9, 10, 11]


def test_the_loss_is_that_of_a_causal_model_with_these_labels(chat: Any) -> None:
    task = Generate(max_length=64)
    batch = task.collate(task.encode([ROW, {**ROW, "completion": "it was"}], chat), 0)
    logits = torch.randn(*batch["input_ids"].shape, 40, dtype=torch.float64)
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )
    assert torch.allclose(task.loss(logits[task.positions(batch)], batch), expected, atol=1e-12)
    sums = task.score(logits[task.positions(batch)], batch)
    assert sums["tokens"] == 7
    assert sums["loss"] / 7 == pytest.approx(float(expected), abs=1e-9)


def test_a_long_row_loses_the_start_of_its_prompt_and_keeps_the_start_of_its_completion(
    chat: Any,
) -> None:
    row = {"prompt": "the a day film what is not good", "completion": "it was bad", "label": ""}
    full = Generate(max_length=64).encode([row], chat)[0]
    assert len(full["input_ids"]) == 15
    cut = Generate(max_length=12).encode([row], chat)[0]
    assert cut["input_ids"] == full["input_ids"][3:]
    ((start, end),) = cut["spans"]
    assert chat.decode(cut["input_ids"][start:end]) == "it was bad <|end|>"
    # the prompt keeps half of the room, and what of the completion does not fit goes from its end
    tight = Generate(max_length=6).encode([row], chat)[0]
    assert chat.decode(tight["input_ids"]) == "good <|end|> <|assistant|> it was bad"
    assert (len(tight["input_ids"]), tight["spans"]) == (6, [(3, 6)])
    assert Generate(max_length=14).truncated([row], chat) == 1
    assert Generate(max_length=15).truncated([row], chat) == 0
    assert Generate().lengths([row, ROW], chat) == [15, 11]


def test_an_extremely_long_prompt_is_cut_and_learnt_from(chat: Any) -> None:
    row = {
        "prompt": "very " * 200_000 + "what is not good",
        "completion": "it was bad",
        "label": "",
    }
    task = Generate(max_length=16)
    (example,) = task.encode([row], chat)
    assert chat.decode(example["input_ids"]).endswith(
        "very what is not good <|end|> <|assistant|> it was bad <|end|>"
    )
    assert (len(example["input_ids"]), len(example["prompt_ids"])) == (16, 16)
    assert task.lengths([row], chat) == [200_011]


def test_a_prompt_to_answer_is_cut_alike(chat: Any) -> None:
    example = Generate(max_length=4).encode([{"prompt": "what is not good"}], chat)[0]
    assert chat.decode(example["prompt_ids"]) == "not good <|end|> <|assistant|>"
    assert "references" not in example
    batch = Generate().collate([example, {"input_ids": [5]}], 0)
    assert "labels" not in batch
    assert Generate().positions(batch).tolist() == [
        [False, False, False, True],
        [True, False, False, False],
    ]


def test_a_completion_of_which_nothing_is_left_is_an_error_with_its_row(chat: Any) -> None:
    import copy

    deaf = copy.deepcopy(chat)
    deaf.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% endfor %}"  # it drops what was said
    )
    with pytest.raises(
        DataError, match=r"row 2 has a completion that the tokenizer turns into nothing; remove it"
    ):
        Template(deaf).tokens(ROW, 2)


def test_a_template_that_keeps_no_prefix_still_gives_prompt_and_completion(chat: Any) -> None:
    import copy

    odd = copy.deepcopy(chat)
    odd.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    prompt, completion = Template(odd).tokens(ROW)
    assert odd.decode(completion) == "it was bad <|end|>"
    assert prompt


def test_ends_are_the_templates_own_and_the_end_of_sequence(chat: Any, plain: Any) -> None:
    assert Template(plain).ends() == [plain.eos_token_id]
    assert Template(chat).ends() == [chat.eos_token_id]
    import copy

    odd = copy.deepcopy(chat)
    odd.chat_template = odd.chat_template.replace("<|end|>", "<|system|>")
    assert Template(odd).ends() == sorted(
        [chat.eos_token_id, chat.convert_tokens_to_ids("<|system|>")]
    )


def test_a_conversation_needs_a_chat_template(plain: Any) -> None:
    messages = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]
    row = {"messages": [{"role": "system", "content": "very"}, *messages], "label": ""}
    with pytest.raises(
        DataError,
        match=r"row 1 is a conversation, but the model's tokenizer has no chat template; ",
    ):
        Generate().encode([row], plain)


def test_a_template_that_refuses_says_so_with_the_row(chat: Any) -> None:
    import copy

    strict = copy.deepcopy(chat)
    strict.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(
        DataError, match=r"row 1 does not fit the model's chat template: no system message, please"
    ):
        Generate().encode([ROW], strict)


# ------------------------------------------------------------ rows
def test_silos_of_pairs_and_of_conversations(
    tmp_path: Path, make_job: MakeJob, write_rows: WriteRows
) -> None:
    pairs = [
        {"question": f"what {i}", "answers": ["yes", "yes indeed"] if i else "no", "x": 1}
        for i in range(4)
    ]
    write_rows(tmp_path / "pairs" / "a.jsonl", pairs)
    settings = ["data.task=generate", "data.source=silos", f"data.path={tmp_path / 'pairs'}"]
    job = make_job(*settings, "data.prompt=question", "data.completion=answers")
    client = build(job).clients[0]
    rows = {row["prompt"]: row for row in [*client.train, *client.test]}
    assert rows["what 0"] == {"prompt": "what 0", "completion": "no", "label": ""}
    assert rows["what 1"] == {
        "prompt": "what 1",
        "completion": "yes",
        "references": ["yes", "yes indeed"],
        "label": "",
    }
    table = build(job).table()
    assert table["labels"] == []
    assert table["clients"][0]["median_words"] == 3

    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "extra": 1},
    ]
    write_rows(tmp_path / "chats" / "a.jsonl", [{"messages": messages}] * 4)
    settings[2] = f"data.path={tmp_path / 'chats'}"
    client = build(make_job(*settings, "data.messages=messages")).clients[0]
    assert client.train[0]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]


def test_parquet_conversations(tmp_path: Path, make_job: MakeJob) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
        for i in range(4)
    ]
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "site.parquet")
    settings = [
        "data.task=generate",
        "data.source=silos",
        f"data.path={tmp_path}",
        "data.messages=messages",
    ]
    assert build(make_job(*settings)).clients[0].train[0]["messages"][0]["content"].startswith("q")


USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
BAD = [
    ({"prompt": "hi"}, r"line 2 has no column 'completion'; it has: prompt"),
    (
        {"messages": [USER, ANSWER]},
        r"line 2 has no column 'prompt'; .*set data.messages = \"messages\"",
    ),
    (
        {"prompt": "hi", "completion": " "},
        r"line 2: the column 'completion' is empty; correct or remove the row",
    ),
    ({"prompt": "hi", "completion": 3}, r"the column 'completion' is a int, not a text"),
    (
        {"prompt": "hi", "completion": []},
        r"the column 'completion' is an empty list; give at least one completion",
    ),
    ({"prompt": "", "completion": "x"}, r"line 2: the column 'prompt' is empty"),
    ({"prompt": None, "completion": "x"}, r"line 2: the column 'prompt' is empty"),
    (
        {"prompt": ["a"], "completion": "x"},
        r"line 2: the column 'prompt' is a list of words, not a text",
    ),
    ({"prompt": "hi", "completion": ["yes", ""]}, r"line 2: the column 'completion' is empty"),
    (
        {"prompt": "hi \ud83d", "completion": "x"},
        r"line 2: the column 'prompt' has a broken character, '\\ud83d'",
    ),
]


def test_roles_are_read_however_they_are_written() -> None:
    spelled = [
        {"from": "System", "value": "be brief"},
        {"from": "Human", "value": "a"},
        {"from": "bing", "value": "b"},
        {"from": " prompter", "value": "c"},
        {"from": "GPT", "value": "d"},
    ]
    roles = [each["role"] for each in conversation(spelled, "messages", "line 1")]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    with pytest.raises(DataError, match="has a message 1 of tools"):
        conversation([{"from": "Tool", "value": "x"}], "messages", "line 1")


BAD_CHATS = [
    (
        "hello",
        r"line 2: the column 'messages' is a str, not a list of messages with a role and a content",
    ),
    ([USER], r"ends in a message of the user; the last message must be the assistant's"),
    ([], r"ends in nothing; the last message must be the assistant's"),
    ([ANSWER], r"has no user's message before the last answer"),
    (
        [USER, {"role": "bot", "content": "x"}],
        r"has a message 2 with the role 'bot'; roles are system, user, assistant",
    ),
    ([{"role": "user"}, ANSWER], r"has a message 1 that is no object with a role and a content"),
    (
        [{"role": "user", "content": []}, ANSWER],
        r"has a message 1 whose content is empty or no text",
    ),
    (
        [{"from": "human", "content": "x"}, ANSWER],
        r"has a message 1 that is no object with a role and a content",
    ),
    (
        [{"from": "tool", "value": "x"}, ANSWER],
        r"has a message 1 of tools, which is not learnt; leave such rows out",
    ),
    (
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
            ANSWER,
        ],
        r"has a message 2 of tools, which is not learnt; leave such rows out",
    ),
    (
        [{"from": "critic", "value": "x"}, ANSWER],
        r"has a message 1 with the role 'critic'; roles are system, user, assistant",
    ),
    (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER],
        r"has a message 1 with a part of the kind 'image_url'; only text is learnt",
    ),
    (
        [USER, ANSWER, USER],
        r"ends in a message of the user; the last message must be the assistant's",
    ),
    (
        [{"role": "user", "content": "\udc00"}, ANSWER],
        r"has a broken character, '\\udc00', which is half of a pair",
    ),
    (
        [USER, {"role": "system", "content": "x"}, ANSWER],
        r"has a system message at place 2; it can only be the first",
    ),
]


@pytest.mark.parametrize(("row", "sentence"), BAD)
def test_bad_rows(
    row: dict[str, Any], sentence: str, tmp_path: Path, make_job: MakeJob, write_rows: WriteRows
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "hi", "completion": "hello"}, row])
    with pytest.raises(DataError, match=sentence) as error:
        build(make_job("data.task=generate", "data.source=silos", f"data.path={tmp_path}"))
    assert "a.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("messages", "sentence"), BAD_CHATS)
def test_bad_conversations(
    messages: Any, sentence: str, tmp_path: Path, make_job: MakeJob, write_rows: WriteRows
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}, {"messages": messages}])
    settings = [
        "data.task=generate",
        "data.source=silos",
        f"data.path={tmp_path}",
        "data.messages=messages",
    ]
    with pytest.raises(DataError, match=sentence) as error:
        build(make_job(*settings))
    assert "\n" not in str(error.value)


def test_a_broken_line_is_named(tmp_path: Path, make_job: MakeJob) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps(ROW) + '\n{"prompt": "hi", "comple\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is not valid JSON"):
        build(make_job("data.task=generate", "data.source=silos", f"data.path={tmp_path}"))


# ------------------------------------------------------------ measures
def test_measures_are_means_and_the_metric_comes_first() -> None:
    from fedgrove.tracking.metrics import metric_name

    task = Generate()
    examples = [{"references": ["bad day"]}, {"references": ["good"]}]
    sums = {"loss": 6.0, "tokens": 3.0, "examples": 2.0} | task.judge(["bad day", "day"], examples)
    measures = task.measure(sums)
    assert measures["loss"] == 2.0
    assert measures["perplexity"] == pytest.approx(7.389056)
    assert (measures["rouge_l"], measures["rouge_1"], measures["exact_match"]) == (0.5, 0.5, 0.5)
    assert (
        metric_name({"round": 1, "client": "a", "split": "test", **measures})
        == task.metric
        == "rouge_l"
    )
    assert task.measure({"loss": 1e4, "tokens": 1.0, "examples": 1.0})["perplexity"] == float("inf")


def test_which_rows_are_generated() -> None:
    assert Generate(generate_examples=3).chosen([{}] * 9) == [0, 3, 6]
    assert Generate(generate_examples=3).chosen([{}] * 2) == [0, 1]


def test_the_card_brings_the_task_back() -> None:
    task = Generate(99, 7, 3)
    assert Generate.from_card(json.loads(json.dumps(task.card()))) == task


def test_pooling_sees_the_prompt_alone(chat: Any) -> None:
    task = Generate(max_length=64)
    whole = task.collate(task.encode([ROW, {**ROW, "prompt": "what is good"}], chat), 0)
    asked = task.collate(
        task.encode([{"prompt": ROW["prompt"]}, {"prompt": "what is good"}], chat), 0
    )
    states = torch.randn(2, whole["input_ids"].shape[1], 5, dtype=torch.float64)
    shorter = states[:, : asked["input_ids"].shape[1]]
    assert torch.allclose(task.pool(states, whole), task.pool(shorter, asked))
    assert torch.allclose(task.pool(states, whole)[0], states[0, :7].mean(0))


# ------------------------------------------------------------ splits
def test_labels_do_not_split_what_has_none(
    tmp_path: Path, make_job: MakeJob, write_rows: WriteRows
) -> None:
    from fedgrove.ground.errors import JobError

    rows = [{"prompt": f"p{i}", "completion": "c", "kind": "xy"[i % 2]} for i in range(400)]
    file = write_rows(tmp_path / "all.jsonl", rows)
    settings = [
        "data.task=generate",
        "data.source=table",
        f"data.path={file}",
        "federation.clients=4",
    ]
    with pytest.raises(
        JobError,
        match=r'data.partition.by = "dirichlet" goes by labels, which this task does not have',
    ):
        build(make_job(*settings))
    assert len(build(make_job(*settings, "data.partition.by=iid")).clients) == 4
    by = "data.partition.options.partition_by=kind"
    skewed = build(make_job(*settings, by, "data.partition.options.alpha=100.0")).clients
    assert sum(len(client.train) + len(client.test) for client in skewed) == 400
    for client in skewed:
        assert sum(client.kinds.values()) == len(client.train)
        assert client.kinds["x"] == sum(int(row["prompt"][1:]) % 2 == 0 for row in client.train)
    natural = build(make_job(*settings, "data.partition.by=natural", "data.group=kind")).clients
    assert [client.name for client in natural] == ["x", "y"]
    assert not any(client.kinds for client in natural), "the clients are the kinds"


def test_only_the_groups_asked_for(
    tmp_path: Path, make_job: MakeJob, write_rows: WriteRows
) -> None:
    from fedgrove.ground.errors import JobError

    rows = [
        {"prompt": f"p{i}", "completion": "c", "kind": f"{'xyz'[i % 3]}-task"} for i in range(30)
    ]
    file = write_rows(tmp_path / "all.jsonl", rows)
    settings = [
        "data.task=generate",
        "data.source=table",
        f"data.path={file}",
        "data.partition.by=natural",
    ]
    found = build(make_job(*settings, "data.group=kind", 'data.groups=["x-*", "z-task"]'))
    assert [client.name for client in found.clients] == ["x-task", "z-task"]
    with pytest.raises(
        JobError,
        match=r"data.groups has 'w', but the column 'kind' has no such group; it has: x-task",
    ):
        build(make_job(*settings, "data.group=kind", 'data.groups=["x-*", "w"]'))
    with pytest.raises(JobError, match=r"data.groups = .* needs data.group"):
        make_job(*settings, 'data.groups=["x"]')


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ["data.task=generate", "data.label=y"],
            r'data.label = "y" has no use with data.task = "generate"; set data.task to "classify-images"',
        ),
        (
            ["data.task=classify-text", "data.prompt=q"],
            r'data.prompt = "q" has no use with data.task = "classify-text"; set data.task to "generate"',
        ),
        (
            ["data.task=generate", "data.messages=m", "data.prompt=q"],
            r'data.prompt = "q" has no use with data.messages = "m"; leave it out',
        ),
    ],
)
def test_keys_of_another_task_are_refused(
    settings: list[str], sentence: str, make_job: MakeJob
) -> None:
    from fedgrove.ground.errors import JobError

    with pytest.raises(JobError, match=sentence):
        make_job(*settings)


def test_a_hub_data_set_of_conversations(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    chats = [
        [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
        for i in range(8)
    ]
    columns = {"conversation": chats, "other": list(range(8))}
    made = datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: made)
    settings = [
        "data.task=generate",
        "data.source=hub",
        "data.name=someone/chats",
        "data.partition.by=iid",
    ]
    found = build(make_job(*settings, "data.messages=conversation", "federation.clients=2"))
    assert [len(client.train) + len(client.test) for client in found.clients] == [4, 4]
    assert found.clients[0].train[0]["messages"][1]["content"].startswith("a")
    with pytest.raises(
        DataError,
        match=r"the hub data set 'someone/chats' has no column 'prompt'; it has: conversation",
    ):
        build(make_job(*settings))
