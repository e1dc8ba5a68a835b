"""A federation that learns to write, end to end on the tiny Llama: run, files, PEFT, load, merge,
adapt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import exchanges, save_bert, save_llama, tiny_job

import fedgrove as fg
from fedgrove.ground.errors import AdapterError, DataError, FedgroveError, JobError, ModelError
from fedgrove.methods import registry
from fedgrove.use.adapt import adapt
from fedgrove.use.result import Result


def job_of(llama: Path, silos: Path, **changes: dict[str, Any]) -> Any:
    data = {
        "task": "generate",
        "max_length": 48,
        "max_new_tokens": 8,
        "generate_examples": 4,
        **changes.pop("data", {}),
    }
    train = {"lr": 1e-2, "local_steps": 6, **changes.pop("train", {})}
    return tiny_job(llama, silos, data=data, train=train, **changes)


@pytest.fixture(scope="module")
def finished(
    tiny_llama: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    silos = request.getfixturevalue("exchanges")
    return fg.run(job_of(tiny_llama, silos), tmp_path_factory.mktemp("runs") / "fedit")


def test_the_run_measures_and_keeps_what_was_written(finished: Result) -> None:
    lines = [line for line in finished.metrics() if line["split"] == "test"]
    assert {line["round"] for line in lines} == {1, 2, 3}
    assert {"loss", "rouge_l", "rouge_1", "exact_match", "perplexity"} <= lines[0].keys()
    first, last = (sum(line["loss"] for line in lines if line["round"] == r) for r in (1, 3))
    assert last < first
    summary = finished.summary
    assert (summary["task"], summary["metric"]) == ("generate", "rouge_l")
    by_client = {line["client"]: line["rouge_l"] for line in lines if line["round"] == 3}
    assert {name: row["metric"] for name, row in summary["clients"].items()} == pytest.approx(
        by_client
    )
    assert summary["mean"] > sum(row["metric_base"] for row in summary["clients"].values()) / 3
    texts = [
        json.loads(line) for line in (finished.path / "generations.jsonl").read_text().splitlines()
    ]
    assert [text["client"] for text in texts] == ["site-0"] * 4 + ["site-1"] * 4 + ["site-2"] * 4
    assert set(texts[0]) == {"client", "prompt", "reference", "output"}
    page = finished.report.read_text()
    assert "What the models write" in page
    assert texts[0]["prompt"] in page


def test_the_adapter_directory_is_pefts(finished: Result, tiny_llama: Path) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.path / "adapters" / "site-1"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    base = AutoModelForCausalLM.from_pretrained(str(tiny_llama), dtype=torch.float64)
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(tiny_llama))
    mine = fg.load(folder, dtype="float64")
    prompts = [row["prompt"] for row in exchanges(5, seed=50)]
    logits, texts = mine.logits(prompts), mine.generate(prompts)
    assert logits.shape == (5, 34)
    for prompt, mine_logits, text in zip(prompts, logits, texts, strict=True):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt"
        )
        with torch.inference_mode():
            assert torch.allclose(theirs(**ids).logits[0, -1], mine_logits, atol=1e-10)
            whole = theirs.generate(**ids, max_new_tokens=8, do_sample=False)
        assert (
            tokenizer.decode(
                whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
            == text
        )
    assert AutoPeftModelForCausalLM.from_pretrained(str(folder)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedit", "hilora"])
def test_the_embedded_decoder_gives_the_same_logits_in_peft(
    method: str, exchanges: Path, tmp_path: Path
) -> None:
    """MiniMind2-Small in float32; PEFT finds the base by the name in the adapter's configuration,
    here a folder.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from fedgrove.interop.models import resolve_name

    changes: dict[str, Any] = {"method": {"name": method}, "train": {"local_steps": 2, "lr": 1e-3}}
    fg.run(job_of(Path("minimind2-small"), exchanges, **changes), tmp_path / "run")
    folder = tmp_path / "run" / "adapters" / "site-1"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "jingyaogong/MiniMind2-Small"
    base = resolve_name("minimind2-small")
    mine = fg.load(folder)
    prompts = ["what is not good", "the film was very very dark, what is not happy", "你好"]
    logits = [
        mine.logits([prompt])[0] for prompt in prompts
    ]  # together they are padded, and round differently
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": base})
    )
    theirs = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    for prompt, ours in zip(prompts, logits, strict=True):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt"
        )
        with torch.inference_mode():
            assert (theirs(**ids).logits[0, -1] - ours).abs().max() <= 1e-5
            with theirs.disable_adapter():
                assert (
                    theirs(**ids).logits[0, -1] - ours
                ).abs().max() > 1e-2  # the adapter does something


def test_a_loaded_model_writes_and_is_measured_as_in_the_run(finished: Result) -> None:
    client = finished.client("site-2")
    measures = client.evaluate()
    assert measures["rouge_l"] == pytest.approx(client.summary["metric"])
    assert measures["loss"] == pytest.approx(client.summary["loss"], abs=1e-5)
    model = client.model()
    assert model.predict(["what is not good"]) == model.generate(["what is not good"])
    assert model.generate([[{"role": "user", "content": "what is not good"}]]) == model.generate(
        ["what is not good"]
    )
    long, short = (
        model.generate(["what is"], max_new_tokens=30),
        model.generate(["what is"], max_new_tokens=1),
    )
    assert len(short[0].split()) <= 1
    assert len(long[0].split()) >= len(short[0].split())


USER = {"role": "user", "content": "what is"}


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("what is", "what a model is asked is a list, of one prompt or more"),
        ([USER], "what a model is asked is a list, of one prompt or more"),
        ([], "the list is empty"),
        (["good", 5], "prompt 2 is of the type int, not a text"),
        (["good", " "], "prompt 2 is empty"),
        (["caf\udce9"], "prompt 1 has the broken character '.udce9'; give it as UTF-8"),
        ([[]], "prompt 1: the column 'prompt' has no user's message"),
        (
            [[{"role": "user"}]],
            "prompt 1: the column 'prompt' has a message 1 that is no object with a role and a",
        ),
        (
            [[{"role": "tool", "content": "x"}]],
            "prompt 1: the column 'prompt' has a message 1 of tools, which is not learnt",
        ),
    ],
)
def test_what_cannot_be_asked(finished: Result, asked: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        finished.client("site-2").model().generate(asked)


@pytest.mark.parametrize("most", [0, -1, 2.5])
def test_nothing_is_no_number_of_tokens(finished: Result, most: Any) -> None:
    with pytest.raises(DataError, match=rf"max_new_tokens = {most} is no number of tokens"):
        finished.client("site-2").model().generate(["good"], max_new_tokens=most)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "there are no rows"),
        ([{"prompt": "x"}], "row 1 has no 'completion'"),
        (["x"], "row 1 is no object"),
    ],
)
def test_what_cannot_be_measured_on(finished: Result, rows: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        finished.client("site-2").model().evaluate(rows)


def test_a_classifier_does_not_write(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    result = fg.run(tiny_job(tiny_bert, silos, run={"rounds": 1}), tmp_path / "run")
    assert not (tmp_path / "run" / "generations.jsonl").exists()
    model = result.client("site-0").model()
    with pytest.raises(DataError, match="row 1 has no 'label'; give rows with 'text' and 'label'"):
        model.evaluate([{"text": "x"}])
    with pytest.raises(DataError, match="of one text or more; put the one text into a list"):
        model.predict("x")
    with pytest.raises(
        AdapterError, match=r"was trained for the task 'classify-text'; it cannot generate text"
    ):
        result.client("site-0").model().generate(["x"])


def test_merged_it_is_an_ordinary_model(finished: Result, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    client = finished.client("site-0")
    folder = client.export(tmp_path / "whole", merge=True)
    prompts = [row["prompt"] for row in exchanges(3, seed=51)]
    expected = client.model().logits(prompts)
    assert torch.allclose(fg.load(folder).logits(prompts), expected, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": prompts[0]}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        assert torch.allclose(model(**ids).logits[0, -1], expected[0], atol=1e-4)


def test_a_newcomer_is_adapted(finished: Result, tmp_path: Path) -> None:
    table = tmp_path / "late.jsonl"
    table.write_text(
        "".join(json.dumps(row) + "\n" for row in exchanges(20, seed=60)), encoding="utf-8"
    )
    adapted = adapt(finished.path, table, epochs=3, out=tmp_path / "late")
    before, after = adapted.measures["zero-shot"], adapted.measures["after 3 epochs"]
    assert (adapted.metric, adapted.head) == ("rouge_l", "")
    assert after["loss"] < before["loss"]
    assert fg.load(adapted.path).generate(["what is not good"])


FAST = ("fedtreelora", "feddpa-t")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in registry.names()
    ],
)
def test_every_method_learns_to_write(
    method: str, tiny_llama: Path, exchanges: Path, tmp_path: Path
) -> None:
    federation = {"ranks": [2, 4]} if registry.method_class(method).ranks == "mixed" else {}
    job = job_of(
        tiny_llama,
        exchanges,
        method={"name": method},
        federation=federation,
        data={"generate_examples": 2},
    )
    result = fg.run(job, tmp_path / method)
    lines = [line for line in result.metrics() if line["split"] == "test"]
    first, last = (sum(line["loss"] for line in lines if line["round"] == r) for r in (1, 3))
    assert last < first
    assert fg.load(tmp_path / method / "adapters" / "site-0").generate(["what is not good"])


def test_keys_of_generation_change_what_is_written(
    tiny_llama: Path, exchanges: Path, tmp_path: Path
) -> None:
    def texts(name: str, **data: Any) -> list[dict[str, Any]]:
        fg.run(job_of(tiny_llama, exchanges, run={"rounds": 1}, data=data), tmp_path / name)
        return [
            json.loads(line)
            for line in (tmp_path / name / "generations.jsonl").read_text().splitlines()
        ]

    few, short = texts("few", generate_examples=1), texts("short", max_new_tokens=1)
    assert len(few) == 3
    assert len(short) == 12
    assert all(len(text["output"].split()) <= 1 for text in short)
    assert any(len(text["output"].split()) > 1 for text in few)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        (
            {"data": {"max_length": 127}},
            JobError,
            r"data.max_length = 127 and data.max_new_tokens = 8 are together more",
        ),
        (
            {"model": {"quantize": "8bit"}},
            ModelError,
            r'model.quantize = "8bit" needs a CUDA GPU, and the job runs on cpu',
        ),
        (
            {"model": {"head": "stock"}},
            JobError,
            r'model.head = "stock" has no use with data.task = "generate"',
        ),
        (
            {"data": {"prompt": "completion"}},
            JobError,
            r'data.prompt and data.completion are both "completion"',
        ),
        (
            {"lora": {"targets": ["lm_head"]}},
            ModelError,
            r"'lm_head' of LlamaForCausalLM shares its weights with the",
        ),
    ],
)
def test_bad_jobs(
    changes: dict[str, Any],
    kind: type[FedgroveError],
    sentence: str,
    tiny_llama: Path,
    exchanges: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(kind, match=sentence) as error:
        fg.run(job_of(tiny_llama, exchanges, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_encoder_does_not_write(tmp_path: Path, exchanges: Path) -> None:
    bert = save_bert(tmp_path / "bert")
    with pytest.raises(
        ModelError, match=r"is a BertModel, which does not write text; for data.task = \"generate\""
    ):
        fg.run(job_of(bert, exchanges), tmp_path / "run")


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "plain", chat=False)
    (tmp_path / "silos").mkdir()
    messages = [
        {"role": "system", "content": "very"},
        {"role": "user", "content": "good"},
        {"role": "assistant", "content": "bad"},
    ]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for _ in range(6))
    (tmp_path / "silos" / "a.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(
        FedgroveError, match=r"client 'a', train split: row 1 is a conversation, but the model's"
    ):
        fg.run(job_of(llama, tmp_path / "silos", data={"messages": "messages"}), tmp_path / "run")
