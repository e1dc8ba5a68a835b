"""Equal adapters are kept once, and every file keeps its bytes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_job

from fedgrove.interop.peft import CARD, HEAD, WEIGHTS
from fedgrove.runs.linked import link_equal
from fedgrove.start import run
from fedgrove.tracking.callback import Callback


def made(root: Path, weights: dict[str, bytes]) -> Path:
    for name, content in weights.items():
        folder = root / name
        folder.mkdir(parents=True)
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
