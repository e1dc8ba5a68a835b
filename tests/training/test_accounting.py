"""What is sent up and down is what each paper says, number by number: ``r (d + k)`` at each site,
or a part of it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import tiny_job

from fedgrove.start import run

RANK, SIDE, SITES = 4, 32, 4  # query and value of two layers, 32 -> 32
A = B = RANK * SIDE * SITES
#: method -> numbers up, numbers down in the second round
THEORY = {
    "local": (0, 0),
    "fedit": (A + B, A + B),
    "ffa-lora": (B, B),
    "fedsa-lora": (A, A),
    "fedvlm": (B, B),
    "flexlora": (A + B, A + B),
    "flora": (A + B, None),  # down: every client's stack
    "fedrot-lora": (A + B, A + B),
    "lora-fair": (A + B, A + B),
    "fedtreelora": (A + B, 2 * (A + B)),  # cluster expert and external expert
}


@pytest.mark.parametrize("method", THEORY)
def test_sent_equals_theory(method: str, tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = tiny_job(
        tiny_bert, silos, method={"name": method}, train={"local_steps": 1}, run={"rounds": 2}
    )
    found = run(job, tmp_path / "run")
    lines = [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "train" and line["round"] == 2]
    up, down = THEORY[method]
    assert len(last) == 3
    for line in last:
        assert line["bytes_up"] == pytest.approx(4 * up, rel=0.01)
        if down is not None:
            assert line["bytes_down"] == pytest.approx(4 * down, rel=0.01)


def test_mixed_ranks_are_counted_by_client(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    ranks = {"site-0": 2, "site-1": 4, "site-2": 1}
    job = tiny_job(
        tiny_bert, silos, method={"name": "flexlora"}, federation={"ranks": ranks}, train={"local_steps": 1},
        run={"rounds": 1},
    )  # fmt: skip
    found = run(job, tmp_path / "run")
    lines = [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]
    sent = {line["client"]: line["bytes_up"] for line in lines if line["split"] == "train"}
    assert sent == {
        name: pytest.approx(4 * rank * 2 * SIDE * SITES, rel=0.01) for name, rank in ranks.items()
    }
