"""The page of what left a site: from its log alone, in words, and over HTTP."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from tests.deploy.test_audit import TREE, written

from fedgrove.cli import main
from fedgrove.deploy.audit import AuditLog, read
from fedgrove.deploy.leaving import Leaving, by_kind, latest, lead
from fedgrove.watch.beside import page


def test_what_left_is_told_in_words(tmp_path: Path) -> None:
    look = Leaving(tmp_path)
    before = look.stamp()
    assert "Nothing has left this site." in look.parts(0.0)["head"]
    log = written(tmp_path / "audit.jsonl")
    assert look.stamp() != before
    log.write(run="r1", round=4, direction="received", kind="train", blob=b"x" * 9, note="<b>late")
    entries = list(read(tmp_path / "audit.jsonl"))
    assert entries[0].numbers == 2 * 3 + 4 * 2
    assert lead(entries).startswith("4 messages of 1 run left this site")
    row = by_kind(entries)[1]
    assert row[1].startswith("an update")
    assert row[2:4] == ["4", "56"]
    newest = latest(entries)[1]
    assert newest[1] == "came: train: <b>late"
    parts = look.parts(0.0)
    assert "&lt;b&gt;late" in parts["latest"]
    assert "whole" in parts["head"]
    assert not re.search("secret|0[.]1234", " ".join(parts.values()))


def test_a_log_that_was_changed_says_so(tmp_path: Path) -> None:
    written(tmp_path / "audit.jsonl")
    text = (tmp_path / "audit.jsonl").read_text().replace('"round":1', '"round":7', 1)
    (tmp_path / "audit.jsonl").write_text(text)
    assert "changed" in Leaving(tmp_path).parts(0.0)["head"]


def test_every_kind_of_message_has_words() -> None:
    from fedgrove.deploy.leaving import _SENT
    from fedgrove.engines.flower.wire import KINDS

    assert set(KINDS) <= set(_SENT)


def test_it_is_served_beside_the_site(tmp_path: Path) -> None:
    AuditLog(tmp_path / "audit.jsonl").write(
        run="r1", round=1, direction="sent", kind="train", blob=b"abc", tree=TREE
    )
    with page(tmp_path, 0, "fedgrove.deploy.leaving:Leaving") as address:
        with urlopen(address, timeout=60) as answer:
            assert f"{tmp_path.name} · what left" in answer.read().decode()
        with urlopen(address + "events", timeout=60) as stream:
            assert stream.readline() == b"event: parts\n"
            assert b"1 message of 1 run left this site" in stream.readline()


def test_what_is_no_site_gets_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "site", str(tmp_path), "--page", "0"]) == 2
    told = capsys.readouterr()
    assert "Watch it" not in told.out
    assert "site.toml" in told.err
