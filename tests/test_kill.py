"""SIGKILL at random moments, then --resume: bit-identical to a run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.stops import hears_ctrl_c
from tests.tiny import tiny_job

FEDGROVE = [sys.executable, "-m", "fedgrove"]


def start(job: Path, out: Path, *extra: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    command = [*FEDGROVE, "run", str(job), "--out", str(out), *extra]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=hears_ctrl_c,
        )


def result(out: Path) -> dict[str, Any]:
    files = {
        str(f.relative_to(out)): f.read_bytes()
        for f in sorted((out / "adapters").rglob("*"))
        if f.is_file()
    }
    summary = json.loads((out / "summary.json").read_text())
    del summary["seconds"]
    return {"files": files, "summary": summary}


def write_job(path: Path, bert: Path, silos: Path, rounds: int = 12) -> Path:
    job = tiny_job(bert, silos, method={"name": "fedsa-lora"}, run={"rounds": rounds})
    path.write_text(job.to_toml(), encoding="utf-8")
    return path


@pytest.mark.slow
def test_sigkill_at_random_moments(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml", tiny_bert, silos)
    whole = start(job, tmp_path / "whole")
    assert whole.wait() == 0
    draw = random.Random(3)
    kills = 0
    for _ in range(40):
        process = start(job, tmp_path / "cut", "--resume")
        wait = draw.uniform(3.0, 9.0)
        try:
            assert process.wait(wait) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills, "the run was too fast to be killed, so this shows nothing"
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_ctrl_c_ends_cleanly_with_a_resumable_run(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = write_job(tmp_path / "job.toml", tiny_bert, silos, rounds=100)  # 3 s: time to stop it
    process = start(job, tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoints" / "latest.json"
    deadline = time.monotonic() + 90
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.wait()
    printed = (tmp_path / "out.log").read_text()
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert "--resume" in printed
    assert not (tmp_path / "out" / "summary.json").exists()
    assert start(job, tmp_path / "out", "--resume").wait() == 0
    assert (tmp_path / "out" / "summary.json").exists()
