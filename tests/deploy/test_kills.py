"""SIGKILL at random moments, at any process of a deployment: the run ends as if nothing had
happened.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from tests.deploy.deployed import PATIENCE, Deployment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/task").exists(),
        reason="finds processes in /proc, which only Linux has",
    ),
]
KILLS, SEED = 5, 20261121


def family(parent: int) -> dict[int, str]:
    """Every process below ``parent``, with its command line."""
    below: dict[int, list[int]] = {}
    commands = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            below.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = {}, [parent]
    while todo:
        for child in below.get(todo.pop(), []):
            found[child] = commands[child]
            todo.append(child)
    return found


def kill(it: Deployment, who: str, part: str) -> bool:
    """SIGKILL to ``who`` itself, or to its child whose command has ``part`` in it; whether there
    was one.
    """
    process = it.running[who]
    if not part:
        it.kill(who)
        return True
    for child, command in family(process.pid).items():
        if part in command:
            os.kill(child, signal.SIGKILL)
            return True
    return False


def test_kills_at_random_moments_change_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    """Two sites, both needed in each round, and no deadline: what a dead process took with it is
    asked for again.
    """
    draw = random.Random(SEED)
    victims = [
        ("site-0", ""),
        ("site-1", "flower-supernode"),
        ("server", ""),
        ("server", "flower-superlink"),
        ("site-1", ""),
    ]
    draw.shuffle(victims)
    method, run = {"name": "fedsa-lora"}, {"rounds": 14, "eval_every": 7}
    with Deployment(tmp_path, tiny_bert, method=method, run=run) as it:
        for name in (*it.names, "server"):
            it.start(name)
        it.until(lambda: it.rounds() >= 1, "the first round")
        done = 0
        deadline = time.monotonic() + PATIENCE
        while it.running["server"].poll() is None or it.running["server"].returncode != 0:
            assert time.monotonic() < deadline, it.all()
            if it.running["server"].poll() is not None:
                time.sleep(2)  # its children see that it is gone
                it.start("server", "--resume")
            if done < KILLS and it.rounds() > 2 * done:
                time.sleep(draw.uniform(0, 4))
                who, part = victims[done]
                if kill(it, who, part):
                    done += 1
                    if not part and who != "server":
                        it.start(who)
            time.sleep(0.2)
        assert done == KILLS, f"the run was over after {done} kills\n{it.all()}"
        it.same_as_local()
