"""Eight sites, each in a network namespace of its own, over lines with delay and cut
connections.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from tests.deploy.deployed import Deployment

SITES, DELAY, CUT = 8, 0.05, 0.02
PORT = 19443  # in each namespace


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


@contextmanager
def namespace(number: int) -> Iterator[str]:
    """A namespace that reaches nothing but this machine, at 10.213.NUMBER.1."""
    name, ours, theirs = (
        f"fedgrove{os.getpid()}-{number}",
        f"fg{os.getpid() % 10000}o{number}",
        f"fg{number}i",
    )
    inside = ("netns", "exec", name, "ip")
    steps = [
        ("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name),
        ("addr", "add", f"10.213.{number}.1/30", "dev", ours),
        ("link", "set", ours, "up"),
        (*inside, "addr", "add", f"10.213.{number}.2/30", "dev", theirs),
        (*inside, "link", "set", theirs, "up"),
        (*inside, "link", "set", "lo", "up"),
    ]
    try:
        if not (ip("netns", "add", name) and all(ip(*step) for step in steps)):
            pytest.skip("this machine gives no network namespaces to this user")
        yield name
    finally:
        ip("link", "del", ours)
        ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
def test_eight_sites_over_bad_lines_equal_the_local_engine(tiny_bert: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        names = [stack.enter_context(namespace(number)) for number in range(SITES)]
        method, run = {"name": "fedsa-lora"}, {"rounds": 2, "eval_every": 2}
        it = stack.enter_context(
            Deployment(tmp_path, tiny_bert, sites=SITES, method=method, run=run)
        )
        relays = []
        for number, (site, name) in enumerate(zip(it.names, names, strict=True)):
            it.change(site, f"localhost:{it.port}", f"localhost:{PORT}")
            line = [
                str(PORT),
                f"10.213.{number}.1",
                str(it.port),
                str(DELAY),
                str(CUT),
                str(number),
            ]
            inside = ["ip", "netns", "exec", name]
            with (tmp_path / f"relay-{number}.log").open("wb") as log:
                relay = subprocess.Popen(
                    [*inside, sys.executable, "tests/deploy/relay.py", *line], stdout=log
                )
            relays.append(relay)
            stack.callback(relay.wait)
            stack.callback(relay.kill)
            it.start(site, prefix=inside)
        it.start("server")
        it.finish()
        cuts = sum(
            (tmp_path / f"relay-{number}.log").read_text().count("cut") for number in range(SITES)
        )
        assert cuts, "no line was ever cut, so this shows nothing"
        it.same_as_local()
