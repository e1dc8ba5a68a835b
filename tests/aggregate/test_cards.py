"""What aggregate says of what it wrote, and that it can be loaded by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_job

import fedgrove as fg
from fedgrove.aggregate.aggregate import aggregate
from fedgrove.use.result import Result

TEXTS = ["the good day", "it was awful"]


@pytest.fixture(scope="module")
def run(tiny_bert: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = str(tmp_path_factory.mktemp("cards") / "run")
    job = tiny_job(tiny_bert, silos, model={"head": "stock"}, run={"rounds": 1, "out": out})
    return fg.run(job)


def test_stock_heads_keep_the_names_of_their_classes(run: Result, tmp_path: Path) -> None:
    folders = [run.client(name).path for name in ("site-0", "site-1")]
    aggregate("fedit", folders, tmp_path / "out", weights="3,1")
    model = fg.load(tmp_path / "out" / "_global")
    assert model.labels == ("negative", "positive")
    heads = [fg.load(folder).assembly.extras["head.classifier.weight"].value for folder in folders]
    found = model.assembly.extras["head.classifier.weight"].value
    torch.testing.assert_close(found, 0.75 * heads[0] + 0.25 * heads[1])
    card = json.loads((tmp_path / "out" / "_global" / "fedgrove.json").read_text())
    assert card["task"] == "classify-text"
    assert not {"client", "same_weights_as", "privacy", "tiers"} & card.keys()
    text = (tmp_path / "out" / "_global" / "README.md").read_text()
    assert text.startswith("---\nbase_model: ")
    assert "library_name: peft" in text
    assert "the clients' mean of `classifier.bias`, `classifier.weight`" in text
    assert "Its classes, in their order: negative, positive." in text
    report = (tmp_path / "out" / "README.md").read_text()
    assert "Round 1 of `fedit` over 2 LoRA adapters" in report
    assert "| site-0 | 0.75 |" in report


def test_without_heads_it_says_so(run: Result, tmp_path: Path) -> None:
    aggregate("flora", [run.client("site-0").path], tmp_path / "out", options=["heads=leave"])
    text = (tmp_path / "out" / "_global" / "README.md").read_text()
    assert "It has no head" in text
    assert (
        "- Heads and other saved modules were left out" in (tmp_path / "out/README.md").read_text()
    )


def test_heads_of_other_classes_are_not_averaged(run: Result, tmp_path: Path) -> None:
    first = run.client("site-0").export(tmp_path / "first")
    second = run.client("site-1").export(tmp_path / "second")
    card = json.loads((second / "fedgrove.json").read_text())
    card["labels"] = card["labels"][::-1]
    (second / "fedgrove.json").write_text(json.dumps(card))
    done = aggregate("fedit", [first, second], tmp_path / "out")
    assert done.notes[-1] == (
        "Heads were left out, because the clients' classes differ: negative, positive and "
        "positive, negative."
    )
    config = json.loads((tmp_path / "out" / "_global" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
