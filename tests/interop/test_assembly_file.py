"""Our own format for models that no PEFT adapter computes: what it says, what it refuses, what it
gives back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.kit import SITES, adapter
from tests.tiny import sentences, tiny_job

import fedgrove as fg
from fedgrove.adapters.assembly import Assembly, Extra, Term
from fedgrove.adapters.private import is_private, seal
from fedgrove.adapters.tree import pack
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.interop.assembly_file import FILE, needs_own_format, read_assembly, save_assembly, why
from fedgrove.methods.fedalt import Gated
from fedgrove.methods.feddpa import ByExample
from fedgrove.methods.fedlease import TopExperts
from fedgrove.start import run


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fedgrove.runs.finish.write_report",
            lambda folder, *_: (folder / "report.html").write_text("-"),
        )
        return run(
            tiny_job(tiny_bert, silos, method={"name": "fedalt"}, run={"rounds": 2}),
            tmp_path_factory.mktemp("runs") / "fedalt",
        )


def assembly_of(**changes: Any) -> Assembly:
    terms = (
        Term("own", adapter(1), home="client"),
        Term("rest", adapter(2), train="", diagonal=None),
    )
    gates = {f"gate.{n}": Extra(seal(torch.randn(2, s.in_features))) for n, s in SITES.items()}
    return Assembly(terms, **{"mix": Gated(), "extras": gates, **changes})


@pytest.mark.parametrize("mix", [Gated(), ByExample(0.3), TopExperts(1, 3, True)])
def test_what_is_written_is_read_back(mix: Any, tmp_path: Path) -> None:
    diagonal = {name: torch.rand(3, dtype=torch.float64) for name in SITES}
    terms = (
        Term("one", adapter(1), train="D", diagonal=diagonal, unit=True),
        Term("two", adapter(2)),
    )
    made = Assembly(terms, mix, assembly_of().extras, adapter(3))
    save_assembly(tmp_path / "a", made, card={"format": 1})
    back = read_assembly(tmp_path / "a", (Gated, ByExample, TopExperts))
    assert back.mix == mix
    assert [(t.name, t.unit, t.train) for t in back.terms] == [
        ("one", True, ""),
        ("two", False, ""),
    ]
    for site in SITES:
        assert torch.equal(back.adapter("one")[site].B, adapter(1)[site].B)
        assert torch.equal(back.term("one").diagonal[site], diagonal[site])  # type: ignore[index]
        assert torch.equal(back.base_delta[site].A, adapter(3)[site].A)  # type: ignore[index]
    assert not any(extra.train or is_private(extra.value) for extra in back.extras.values())
    assert list(back.extras) == list(made.extras)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [FILE, "fedgrove.json"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["a"]


def test_linear_mixes_need_no_format_of_ours() -> None:
    assert needs_own_format(assembly_of())
    assert not needs_own_format(Assembly((Term("own", adapter(1)),)))
    assert "own, rest" in why(assembly_of(), "FedALT")


def test_a_run_directory_says_why_there_is_no_peft_adapter(finished: Any) -> None:
    folder = finished.client("site-0").path
    assert sorted(file.name for file in folder.iterdir()) == [
        FILE,
        "fedgrove.json",
        "measures.json",
    ]
    card = json.loads((folder / "fedgrove.json").read_text())
    assert card["peft"] is False
    assert card["why"].startswith("FedALT weighs its LoRA terms (own, rest) anew for each input")
    assert card["labels"] == ["negative", "positive"]


def test_an_export_is_the_same_model_and_a_merge_is_refused_with_the_reason(
    finished: Any, tmp_path: Path
) -> None:
    client = finished.client("site-1")
    texts = [row["text"] for row in sentences(5, seed=1)]
    want = client.model().logits(texts)
    out = client.export(tmp_path / "copy")
    assert torch.equal(fg.load(out).logits(texts), want)
    with pytest.raises(
        AdapterError, match=r"site-1 cannot be merged: FedALT weighs .* which no PEFT adapter"
    ):
        client.export(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(RunError, match="no tiers"):
        client.export(tmp_path / "tier", tier="leaf")


def broken(folder: Path, change: Any) -> None:
    from fedgrove.adapters.tree import unpack

    tree = unpack((folder / FILE).read_bytes())
    change(tree)
    (folder / FILE).write_bytes(pack(tree))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("terms"), "lacks a part"),
        (lambda tree: tree["mix"].update(name="Other"), "'Other', which this version"),
        (lambda tree: tree["mix"].update(parameters={"odd": 1}), "lacks a part"),
        (lambda tree: tree["terms"].__setitem__(0, 3), "lacks a part"),
    ],
)
def test_an_altered_file_is_refused_in_one_sentence(
    change: Any, message: str, finished: Any, tmp_path: Path
) -> None:
    out = finished.client("site-0").export(tmp_path / "copy")
    broken(out, change)
    with pytest.raises(AdapterError, match=message) as caught:
        fg.load(out)
    assert FILE in str(caught.value)


def test_a_file_that_was_cut_short_is_refused(finished: Any, tmp_path: Path) -> None:
    out = finished.client("site-0").export(tmp_path / "copy")
    data = (out / FILE).read_bytes()
    (out / FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match="cut short"):
        fg.load(out)
