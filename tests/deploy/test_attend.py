"""A site's supervisor: the SuperNode is started again, its troubles told in our words; children end
with us.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from fedgrove.deploy import attend as attending
from fedgrove.deploy.attend import Watch, attend
from fedgrove.deploy.certificates import DeployError
from fedgrove.deploy.launch import environment
from fedgrove.deploy.layout import Request, init


def child(words: str, seconds: float, log: Path) -> subprocess.Popen[bytes]:
    code = f"import time; print({words!r}, flush=True); time.sleep({seconds})"
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file)


def watched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *children: tuple[str, float]
) -> tuple[list[str], int]:
    monkeypatch.setattr(attending, "_PAUSES", (0.0,))
    log = tmp_path / "node.log"
    said: list[str] = []
    started: list[subprocess.Popen[bytes]] = []
    waiting = iter(children)

    def start() -> subprocess.Popen[bytes]:
        started.append(child(*next(waiting), log))
        return started[-1]

    log.write_text("SuperNode ID: of a run long ago\n")
    watch = Watch(start, log, "fl.example.org:1", said.append)
    deadline = time.monotonic() + 20
    try:
        while time.monotonic() < deadline and not (
            len(started) == len(children)
            and started[-1].poll() is None
            and "last" in log.read_text()
        ):
            watch.alive()
            time.sleep(0.02)
        watch.alive()
    finally:
        watch.close()
        for process in started:
            process.wait()
    return said, len(started)


def test_a_supernode_that_ends_is_started_again_and_says_why_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = ("[code: 2004] Failed to activate SuperNode.", 0.0)
    said, started = watched(
        monkeypatch, tmp_path, refused, refused, ("SuperNode ID: 7, the last", 60)
    )
    assert started == 3
    assert len(said) == 2
    assert "does not know this site's key" in said[0]
    assert said[1] == "Connected to fl.example.org:1."


def test_a_supernode_that_gives_up_and_stays_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's process does not end where a TLS handshake breaks, although it does nothing more."""
    stuck = (
        "SSL/TLS handshake error detected.\nGiving up reconnection after 0.47 seconds and 2 tries.",
        60,
    )
    began = time.monotonic()
    _, started = watched(monkeypatch, tmp_path, stuck, ("SuperNode ID: 7, the last", 60))
    assert started == 2
    assert time.monotonic() - began < 15


def test_a_certificate_that_does_not_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", 0.0)
    said, _ = watched(monkeypatch, tmp_path, bad, ("last", 60))
    assert said == [
        "The server's certificate cannot be verified with ca.crt; `fedgrove deploy check` says why."
    ]


def test_what_is_missing_is_said_before_anything_starts(tmp_path: Path) -> None:
    init(Request(tmp_path / "d", sites=["a"], keys=False))
    site = tmp_path / "d" / "sites" / "a"
    with pytest.raises(DeployError, match=r"node\.key is missing"):
        attend(site)
    (site / "node.key").write_text("nonsense")
    with pytest.raises(DeployError, match="no OpenSSH private key"):
        attend(site)
    from fedgrove.deploy.layout import make_key

    make_key(site, "a", force=True)
    with pytest.raises(DeployError, match=r"data\.csv does not exist"):
        attend(site)
    assert not (site / "flwr").exists()


def test_flower_runs_without_telemetry_and_installs_nothing(tmp_path: Path) -> None:
    found = environment(tmp_path)
    assert (
        found["FLWR_TELEMETRY_ENABLED"],
        found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"],
    ) == ("0", "1")
    assert found["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert found["FLWR_HOME"] == str(tmp_path)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")
def test_a_child_ends_with_its_parent_whatever_becomes_of_it(tmp_path: Path) -> None:
    """The parent starts a SuperLink and gets SIGKILL, of which nobody is told."""
    code = (
        "import sys, time; from pathlib import Path; from fedgrove.deploy import launch\n"
        f"home = Path({str(tmp_path)!r})\n"
        "command = ['flower-superlink', '--insecure', '--port', str(launch.free_port()), "
        "'--isolation', 'process']\n"
        "child = launch.start(command, home=home, log=(home / 'log').open('ab'))\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.abspath("src")}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    with parent, parent.stdout:
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while "Uvicorn running" not in _text(tmp_path / "log") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert Path(f"/proc/{pid}").exists(), _text(tmp_path / "log")
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _runs(pid: int) -> bool:
    status = _text(Path(f"/proc/{pid}/status"))
    return bool(status) and "State:\tZ" not in status
