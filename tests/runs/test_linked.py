"""Equal adapters are kept once, and every file keeps its bytes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_job

from fedgrove.adapters import Factors
from fedgrove.interop.copies import Copies, content_key
from fedgrove.interop.peft import CARD, HEAD, WEIGHTS, save_adapter
from fedgrove.runs.linked import link_equal
from fedgrove.start import run
from fedgrove.tracking.callback import Callback


def made(root: Path, weights: dict[str, bytes]) -> Path:
    for name, content in weights.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(content)
        client = None if name == "_global" else name
        (folder / CARD).write_text(json.dumps({"client": client}), encoding="utf-8")
    return root


def files(root: Path) -> dict[str, int]:
    return {file.parent.name: file.stat().st_ino for file in root.rglob(WEIGHTS)}


def told(root: Path, name: str) -> Any:
    return json.loads((root / name / CARD).read_text()).get("same_weights_as")


def test_equal_weights_become_one_file_and_others_stay(tmp_path: Path) -> None:
    root = made(tmp_path / "a", {"A": b"x", "_global": b"x", "b": b"y", "c": b"x"})
    assert link_equal(root) == 2
    found = files(root)
    assert found["A"] == found["c"] == found["_global"] != found["b"]
    assert {name: told(root, name) for name in found} == {
        "A": "_global", "_global": None, "b": None, "c": "_global",
    }  # fmt: skip
    assert (root / "c" / WEIGHTS).read_bytes() == b"x"
    cards = {name: (root / name / CARD).read_bytes() for name in found}
    assert link_equal(root) == 2  # once more changes nothing
    assert files(root) == found
    assert {name: (root / name / CARD).read_bytes() for name in found} == cards
    shutil.rmtree(root / "_global")
    assert (root / "A" / WEIGHTS).read_bytes() == b"x"


def test_without_hard_links_they_stay_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    root = made(tmp_path / "a", {"a": b"x", "b": b"x"})
    assert link_equal(root) == 0
    assert told(root, "b") is None
    assert (root / "b" / WEIGHTS).read_bytes() == b"x"


def test_names_are_those_of_the_order_whoever_was_written_first(tmp_path: Path) -> None:
    root = made(tmp_path / "a", {"b": b"x", "a": b"y"})
    for name in ("a", "c"):
        (root / name).mkdir(exist_ok=True)
        (root / name / WEIGHTS).unlink(missing_ok=True)
        os.link(root / "b" / WEIGHTS, root / name / WEIGHTS)
        card = {"client": name, "same_weights_as": "b"}
        (root / name / CARD).write_text(json.dumps(card), encoding="utf-8")
    made(root, {"_global": b"x"})
    inode = (root / "b" / WEIGHTS).stat().st_ino
    assert link_equal(root) == 3
    assert set(files(root).values()) == {inode}  # the one that had most names, not the first
    assert {name: told(root, name) for name in ("_global", "a", "b", "c")} == {
        "_global": None, "a": "_global", "b": "_global", "c": "_global",
    }  # fmt: skip
    shutil.rmtree(root / "_global")
    assert link_equal(root) == 2
    assert [told(root, name) for name in "abc"] == [None, "a", "a"]


def adapter(value: float) -> dict[str, Factors]:
    return {"layer.query": Factors(torch.full((2, 3), value), torch.ones(4, 2), 0.5)}


def save(folder: Path, copies: Copies | None, value: float = 1.0, head: float = 0.0) -> None:
    save_adapter(
        folder,
        adapter(value),
        base="b",
        head={"weight": torch.full((2, 3), head)},
        head_kind="pooled",
        card={"client": folder.name},
        copies=copies,
    )


def test_what_is_equal_is_linked_as_it_is_written(tmp_path: Path) -> None:
    plain, shared = tmp_path / "plain", tmp_path / "shared"
    written = {"a": (1.0, 0.0), "b": (1.0, 5.0), "c": (2.0, 0.0), "d": (1.0, 0.0)}
    copies = Copies()
    for name, (value, head) in written.items():
        save(plain / name, None, value, head)
        save(shared / name, copies, value, head)
    found = files(shared)
    assert found["a"] == found["b"] == found["d"] != found["c"]
    heads = {file.parent.name: file.stat().st_ino for file in shared.rglob(HEAD)}
    assert heads["a"] == heads["c"] == heads["d"] != heads["b"]
    assert len({file.stat().st_ino for file in shared.rglob("adapter_config.json")}) == 4
    assert [told(shared, name) for name in written] == [None, "a", None, "a"]
    link_equal(plain)
    link_equal(shared)
    for file in plain.rglob("*"):
        if file.is_file():
            assert (shared / file.relative_to(plain)).read_bytes() == file.read_bytes()
    assert {file.relative_to(plain) for file in plain.rglob("*")} == {
        file.relative_to(shared) for file in shared.rglob("*")
    }


def test_an_origin_that_was_written_anew_or_is_full_is_no_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = Copies()
    save(tmp_path / "a", copies)
    save(tmp_path / "a", None, 2.0)
    save(tmp_path / "b", copies)
    assert (tmp_path / "b" / WEIGHTS).stat().st_nlink == 1
    save(tmp_path / "c", copies)
    assert (tmp_path / "c" / WEIGHTS).samefile(tmp_path / "b" / WEIGHTS)

    def refuse(*_: Any) -> None:
        raise OSError("too many links")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        save(tmp_path / "d", copies)
    assert (tmp_path / "d" / WEIGHTS).stat().st_nlink == 1
    save(tmp_path / "e", copies)
    assert (tmp_path / "e" / WEIGHTS).samefile(tmp_path / "d" / WEIGHTS)


def test_content_is_told_apart_by_bytes_shapes_and_what_is_beside() -> None:
    ones, flat = torch.ones(2, 3), torch.ones(3, 2)
    assert content_key({"a": ones}) == content_key({"a": ones.clone()})
    assert content_key({"a": ones}) == content_key({"a": torch.ones(3, 2).T})
    others = [
        content_key({"a": flat}),
        content_key({"b": ones}),
        content_key({"a": ones.double()}),
        content_key({"a": ones, "b": flat}),
        content_key({"a": ones}, "head"),
        content_key({"a": torch.tensor([[0.0, 1, 1], [1, 1, 1]])}),
        content_key({"a": torch.tensor([[-0.0, 1, 1], [1, 1, 1]])}),
    ]
    assert len({content_key({"a": ones}), *others}) == 1 + len(others)


class Remarks(Callback):
    def __init__(self) -> None:
        self.said: list[str] = []

    def remark(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(
    ("method", "head", "names", "heads"),
    [("fedit", "local", 4, 4), ("flora", "shared", 3, 1)],
)
def test_a_run_keeps_a_global_model_once(
    method: str, head: str, names: int, heads: int, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos, method={"name": method}, federation={"head": head})
    job = job.replace(run={"rounds": 1}, lora={"rank": 12})  # three stacked: beyond the width, 32
    remarks = Remarks()
    result = run(job, tmp_path / "run", callbacks=[remarks])
    adapters = result.path / "adapters"
    assert (adapters / "site-2" / WEIGHTS).stat().st_nlink == names
    assert len({file.stat().st_ino for file in adapters.glob(f"*/{HEAD}")}) == heads
    assert any("hard links" in each for each in remarks.said) == (names > 1)
    ranks = json.loads((adapters / "site-2" / "adapter_config.json").read_text())["r"]
    assert ranks == (32 if method == "flora" else 12)
    result.client("site-2").export(tmp_path / "own")
    assert (tmp_path / "own" / WEIGHTS).stat().st_nlink == 1
