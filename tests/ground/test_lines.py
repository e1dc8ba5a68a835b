"""Files of JSON lines: whole lines, in order, whatever becomes of the writer."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path

import pytest

from fedgrove.ground.errors import RunError
from fedgrove.ground.lines import append, appending, read, truncate_after


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append(path, {"round": 1, "who": "ü"}, {"round": 2, "loss": math.nan})
    append(path)
    append(path, {"round": 3, "loss": math.inf})
    assert path.read_text(encoding="utf-8").startswith('{"round": 1, "who": "ü"}\n')
    assert read(path) == [
        {"round": 1, "who": "ü"},
        {"round": 2, "loss": None},
        {"round": 3, "loss": None},
    ]


def test_a_line_that_a_crash_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append(path, {"round": 1}, {"round": 2})
    path.write_bytes(path.read_bytes()[:-5])
    assert read(path) == [{"round": 1}]
    append(path, {"round": 3})
    assert [json.loads(row) for row in path.read_text().splitlines()[::2]] == [
        {"round": 1},
        {"round": 3},
    ]
    with pytest.raises(RunError, match=r"x\.jsonl line 2 is no JSON object with round"):
        read(path)


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 200_000])
def test_the_last_line_is_found_however_long_it_is(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"first\n" + b"x" * size + b"\n")
    with appending(path) as log:
        assert log.last == b"x" * size
        log.write({"round": 1})
        assert log.last == b'{"round": 1}'


def test_an_empty_file_has_no_last_line(tmp_path: Path) -> None:
    with appending(tmp_path / "x.jsonl") as log:
        assert log.last == b""


def test_other_keys_may_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append(path, {"round": 1})
    with pytest.raises(RunError, match="with round, client"):
        read(path, ("round", "client"))
    with pytest.raises(RunError, match="with round, client"):
        truncate_after(path, 0, ("round", "client"))


def _writes(path: Path, who: int) -> None:
    for number in range(50):
        append(path, {"round": number, "who": who})


def test_two_processes_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    start = multiprocessing.get_context("spawn")
    writers = [start.Process(target=_writes, args=(path, who)) for who in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = read(path)
    for who in range(2):
        assert [line["round"] for line in found if line["who"] == who] == list(range(50))
