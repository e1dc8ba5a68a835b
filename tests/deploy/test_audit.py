"""The log of a site: complete, without values, and telling when it was changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.tree import pack
from fedgrove.deploy.audit import AuditLog, broken, read

TREE = {
    "adapter": {"layer.0": Factors(torch.full((2, 3), 0.123456), torch.zeros(4, 2), 1.0)},
    "note": "secret words",
}


def written(path: Path, lines: int = 4) -> AuditLog:
    log = AuditLog(path)
    for number in range(lines):
        blob = pack(TREE) + bytes(number)
        log.write(run="r1", round=number, direction="sent", kind="train", blob=blob, tree=TREE)
    return log


def test_an_entry_tells_names_and_shapes_and_size_and_hash(tmp_path: Path) -> None:
    written(tmp_path / "audit.jsonl")
    entries = list(read(tmp_path / "audit.jsonl"))
    assert [entry.round for entry in entries] == [0, 1, 2, 3]
    blob = pack(TREE) + bytes(2)
    assert (entries[2].bytes, entries[2].sha256) == (len(blob), hashlib.sha256(blob).hexdigest())
    assert entries[2].tensors == (
        ("adapter/layer.0.A", "float32", (2, 3)),
        ("adapter/layer.0.B", "float32", (4, 2)),
    )


def test_no_value_and_no_text_of_a_message_is_in_the_log(tmp_path: Path) -> None:
    written(tmp_path / "audit.jsonl")
    text = (tmp_path / "audit.jsonl").read_text()
    assert "secret" not in text
    assert "0.1234" not in text


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    written(tmp_path / "audit.jsonl")
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_an_untouched_log_is_whole_and_every_change_shows(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path, 5)
    assert broken(path) == []
    lines = path.read_text().splitlines()
    changed = json.loads(lines[1]) | {"bytes": 1}
    for edited in (
        [lines[0], json.dumps(changed, separators=(",", ":")), *lines[2:]],  # one changed
        [lines[0], *lines[2:]],  # one removed
        [lines[0], lines[2], lines[1], *lines[3:]],  # two swapped
        lines[1:],  # the first removed
    ):
        path.write_text("\n".join(edited) + "\n")
        assert broken(path), edited


def test_a_line_cut_short_by_a_crash_is_named_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = written(path, 3)
    path.write_bytes(path.read_bytes()[:-40])
    log.write(run="r1", round=9, direction="received", kind="train", blob=b"x")
    log.write(run="r1", round=10, direction="received", kind="train", blob=b"x")
    assert broken(path) == [3]
    assert [entry.round for entry in read(path)] == [0, 1, 9, 10]


def test_long_lines_are_chained_too(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    wide = {
        f"layer.{number}": torch.zeros(1) for number in range(5000)
    }  # a line of more than one block
    for _ in range(3):
        log.write(run="r", round=1, direction="sent", kind="train", blob=b"", tree=wide)
    assert broken(path) == []
