from __future__ import annotations

import json
from pathlib import Path

from fedgrove.report.pictures.generations import LONGEST, SHOWN, generations, short
from fedgrove.report.sections import Left


def write(folder: Path, clients: int, each: int, **changes: str) -> Path:
    lines = [
        {
            "client": f"site-{c}",
            "prompt": f"p{c}-{n}",
            "reference": "right",
            "output": "written",
            **changes,
        }
        for c in range(clients)
        for n in range(each)
    ]
    (folder / "generations.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return folder


def test_a_few_of_every_client(tmp_path: Path) -> None:
    (found,) = generations(Left(write(tmp_path, 3, 9)))
    assert found.prose
    assert found.table[0] == ("client", "prompt", "written", "right")
    assert [row[0] for row in found.table[1:]] == ["site-0"] * 4 + ["site-1"] * 4 + ["site-2"] * 4
    assert "12 of the 27" in found.text


def test_many_clients_do_not_fill_the_page(tmp_path: Path) -> None:
    (found,) = generations(Left(write(tmp_path, 40, 2)))
    assert len(found.table) == 1 + SHOWN


def test_long_and_empty_texts(tmp_path: Path) -> None:
    (found,) = generations(
        Left(write(tmp_path, 1, 1, prompt="start " + "x " * 900 + "end", output=" "))
    )
    row = found.table[1]
    assert row[1].startswith("start x")
    assert row[1].endswith("x end")
    assert len(row[1]) <= LONGEST + 3
    assert row[2] == "(nothing)"
    assert short("a\n b") == "a b"
