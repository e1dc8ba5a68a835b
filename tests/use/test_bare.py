"""Adapter directories on the command line, without their run: asked, measured, exported."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import save_bert, save_silos, sentences, tiny_job
from tests.use.test_after import said
from tests.use.test_foreign import TEXTS, logits_of, trained

import fedgrove as fg
from fedgrove.aggregate.aggregate import aggregate
from fedgrove.ground.errors import AdapterError, DataError, ModelError, RunError
from fedgrove.use.chosen import chosen
from fedgrove.use.matrix import figure
from fedgrove.use.result import Result


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bare") / "bert")


@pytest.fixture(scope="module")
def theirs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A classifier of two classes that PEFT wrote, and PEFT's model."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(str(bert), num_labels=2)
    folder = tmp_path_factory.mktemp("theirs") / "ordinary"
    return folder, trained(model, folder, "SEQ_CLS", ["query", "value"])


@pytest.fixture(scope="module")
def run(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    home = tmp_path_factory.mktemp("bare-run")
    silos = save_silos(home / "silos", clients=2)
    out = {"rounds": 1, "out": str(home / "run"), "seed": 7}
    return fg.run(tiny_job(bert, silos, federation={"head": "shared"}, run=out))


def table(path: Path, columns: tuple[str, str] = ("text", "label")) -> Path:
    rows = [(row["text"], row["label"]) for row in sentences(7, seed=5)]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_an_adapter_of_peft_is_asked_with_probabilities(
    bert: Path, theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, peft = theirs
    wanted = logits_of(peft, bert, TEXTS).softmax(-1)
    lines = said("predict", str(folder), *TEXTS, "--probs", "--labels", "bad, good").splitlines()
    for line, text, (bad, good) in zip(lines, TEXTS, wanted.tolist(), strict=True):
        best = ("bad", "good")[good > bad]
        assert line == f"{best}\tbad {bad:.3f}\tgood {good:.3f}\t{text}"
    data, out = tmp_path / "new.csv", tmp_path / "answers.jsonl"
    data.write_text("review\n" + "\n".join(TEXTS) + "\n", encoding="utf-8")
    asked = ("predict", str(folder), "--data", str(data), "--set", "data.text=review")
    said(*asked, "--out", str(out))
    told = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    given = torch.tensor([list(each["scores"].values()) for each in told])
    assert list(told[0]["scores"]) == ["LABEL_0", "LABEL_1"]
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert said(*asked, "--probs").count("LABEL_1 0.") == len(TEXTS)
    with pytest.raises(RunError, match="is one adapter; leave out --client site-0"):
        said(*asked, "--client", "site-0")


def test_an_adapter_of_peft_is_measured_on_a_table(
    bert: Path, theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, peft = theirs
    data = table(tmp_path / "test.csv", ("review", "mood"))
    rows = sentences(7, seed=5)
    numbers = logits_of(peft, bert, [row["text"] for row in rows]).argmax(-1).tolist()
    names = ("negative", "positive")
    right = sum(names[n] == row["label"] for n, row in zip(numbers, rows, strict=True))
    columns = ("--set", "data.text=review", "--set", "data.label=mood")
    line = said(
        "evaluate", str(folder), "--data", str(data), "--labels", ",".join(names), *columns,
        "--metrics", "accuracy",
    )  # fmt: skip
    assert line == f"ordinary  accuracy {figure(right / 7)}\n"
    assert 0 < right < 7
    with pytest.raises(DataError, match="does not name its classes: give them"):
        said("evaluate", str(folder), "--data", str(data), *columns)
    with pytest.raises(RunError, match="has no test data of its own"):
        said("evaluate", str(folder))
    with pytest.raises(RunError, match="--on all is for a run"):
        said("evaluate", str(folder), "--on", "all")


def test_what_a_run_and_aggregate_left_is_asked_by_its_folder(run: Result, tmp_path: Path) -> None:
    client = run.client("site-1")
    by_name = said("predict", str(run.path), "--client", "site-1", *TEXTS, "--probs")
    assert said("predict", str(client.path), *TEXTS, "--probs") == by_name
    data = table(tmp_path / "test.csv")
    wanted = client.measures(data)
    assert chosen(client.path, None).measures(data) == wanted
    aggregate("fedit", [client.path], tmp_path / "out")
    line = said("evaluate", str(tmp_path / "out" / "_global"), "--data", str(data))
    assert f"accuracy {figure(wanted['accuracy'])}" in line
    with pytest.raises(RunError, match=r"is a run; give one of its clients with --client \(site-0"):
        said("predict", str(run.path), *TEXTS)


def test_a_base_that_lies_elsewhere_is_named(
    bert: Path, theirs: tuple[Path, Any], run: Result, tmp_path: Path
) -> None:
    folder, peft = theirs
    wanted = logits_of(peft, bert, TEXTS)
    for source, logits in ((folder, wanted), (run.client("site-0").path, None)):
        moved = tmp_path / source.name
        shutil.copytree(source, moved)
        for file in ("adapter_config.json", "fedgrove.json"):
            if (moved / file).exists():
                text = (moved / file).read_text(encoding="utf-8")
                (moved / file).write_text(text.replace(str(bert), "/nowhere/bert"))
        with pytest.raises(ModelError, match=r"/nowhere/bert.*Where it lies elsewhere.*--base"):
            said("predict", str(moved), "good")
        if logits is None:
            logits = fg.load(source).logits(TEXTS)
        found = chosen(moved, None, base=str(bert)).model().logits(TEXTS)
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
        out = tmp_path / f"{source.name}-out"
        said("export", str(moved), "--base", str(bert), "--out", str(out))
        torch.testing.assert_close(fg.load(out).logits(TEXTS), logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_peft_is_exported_as_ours_are(
    bert: Path, theirs: tuple[Path, Any], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForSequenceClassification

    folder, peft = theirs
    wrapped = tmp_path / "wrapped"
    shutil.copytree(folder, wrapped)
    file = wrapped / "adapter_model.safetensors"
    save_file({f"module._orig_mod.{n}": v for n, v in load_file(file).items()}, file)
    wanted = logits_of(peft, bert, TEXTS)
    said("export", str(wrapped), "--out", str(tmp_path / "out"))
    plain = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits_of(plain, bert, TEXTS), wanted, atol=1e-5, rtol=1e-5)
    said("export", str(wrapped), "--merge", "--out", str(tmp_path / "merged"))
    loaded = fg.load(tmp_path / "merged").logits(TEXTS)
    torch.testing.assert_close(loaded, wanted, atol=1e-5, rtol=1e-5)
    assert "predict" not in said("predict", str(tmp_path / "merged"), *TEXTS)
    words = said("export", str(wrapped), "--rank", "1", "--out", str(tmp_path / "small"))
    assert "Truncated to rank 1" in words
    with pytest.raises(RunError, match="has no tiers"):
        said("export", str(wrapped), "--tier", "leaf", "--out", str(tmp_path / "tier"))
    with pytest.raises(RunError, match="is a whole model already"):
        said("export", str(tmp_path / "merged"), "--out", str(tmp_path / "again"))
    with pytest.raises(RunError, match="does not exist"):
        said("export", str(tmp_path / "nothing"), "--out", str(tmp_path / "x"))


def test_what_is_no_model_or_not_whole_is_told(run: Result, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is neither a run nor an adapter directory"):
        said("predict", str(run.path / "adapters"), "good")
    broken = tmp_path / "broken"
    shutil.copytree(run.client("site-0").path, broken)
    weights = broken / "adapter_model.safetensors"
    cut = weights.read_bytes()[:600]
    weights.unlink()
    weights.write_bytes(cut)
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match="is not a whole safetensors file"):
        said("export", str(broken), "--out", str(out))
    weights.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors does not exist"):
        said("export", str(broken), "--out", str(out))
    assert not out.exists()


def test_a_writer_has_no_probabilities_of_classes(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    trained(model, tmp_path / "writer", "CAUSAL_LM", ["q_proj", "v_proj"])
    with pytest.raises(DataError, match="'generate' has no classes"):
        said("predict", str(tmp_path / "writer"), "what is not good", "--probs")
    data = tmp_path / "new.jsonl"
    data.write_text('{"prompt": "what is not good", "completion": "sad"}\n', encoding="utf-8")
    out = tmp_path / "answers.csv"
    said("predict", str(tmp_path / "writer"), "--data", str(data), "--out", str(out))
    assert out.read_text(encoding="utf-8").startswith("row,asked,predicted\n1,what is not good,")
    line = said("evaluate", str(tmp_path / "writer"), "--data", str(data))
    assert line.startswith("writer  loss ")


def test_no_head_is_said_on_the_command_line_too(theirs: tuple[Path, Any], tmp_path: Path) -> None:
    aggregate("fedit", [theirs[0]], tmp_path / "out", options=["heads=leave"])
    with pytest.raises(AdapterError, match="has no head that was trained"):
        said("predict", str(tmp_path / "out" / "_global"), "good")
