"""A job of today gives the bytes that it gave before the house was rebuilt, but for the changes with a reason.

``tests/fingerprints/main.json`` was made by ``tests/fingerprints/make.py``; a change of a digest needs a line in the
changelog that says why, and the file made anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.fingerprints import make

KNOWN = json.loads((Path(__file__).parent / "fingerprints" / "main.json").read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(KNOWN["methods"]))
def test_a_job_gives_the_bytes_that_it_gave(method: str, tmp_path: Path) -> None:
    if KNOWN["machine"] != make.machine():
        pytest.skip(f"the digests are of another machine: {KNOWN['machine']}")
    assert make.fingerprint(method, tmp_path / "run") == KNOWN["methods"][method]


def test_no_method_was_lost() -> None:
    assert set(KNOWN["methods"]) <= set(make.own_methods())
