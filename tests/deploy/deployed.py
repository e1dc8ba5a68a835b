"""A whole deployment on this machine: a server and sites as processes of their own, started,
killed, looked at.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.tiny import save_silos, tiny_job

from fedgrove.deploy.launch import free_port
from fedgrove.deploy.layout import Request, init
from fedgrove.job import Job

FEDGROVE = [sys.executable, "-m", "fedgrove", "deploy"]
PATIENCE = 900.0  # seconds for anything; an idle machine takes a tenth of it


class Deployment:
    """``with Deployment(...) as it:`` everything that was started ends with the block."""

    def __init__(self, folder: Path, bert: Path, sites: int = 2, **changes: Any):
        self.folder = folder
        self.names = [f"site-{number}" for number in range(sites)]
        silos = save_silos(folder / "silos", clients=sites)
        federation = {"min_clients": sites, **changes.pop("federation", {})}
        data = {"labels": ["negative", "positive"], **changes.pop("data", {})}
        self.job: Job = tiny_job(bert, silos, data=data, federation=federation, **changes)
        (folder / "job.toml").write_text(self.job.to_toml())
        self.port = free_port()
        init(Request(folder / "d", "localhost", self.port, self.names, folder / "job.toml"))
        self.server = folder / "d" / "server"
        for name in self.names:
            (self.site(name) / f"{name}.jsonl").write_bytes((silos / f"{name}.jsonl").read_bytes())
            self.change(name, 'path = "data.csv"', f'path = "{name}.jsonl"')
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *ignored: Any) -> None:
        for child in self.running.values():
            if child.poll() is None:
                child.kill()
            child.wait()

    # ------------------------------------------------------------------ before
    def site(self, name: str) -> Path:
        return self.folder / "d" / "sites" / name

    def change(self, name: str, old: str, new: str) -> None:
        path = self.site(name) / "site.toml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    # ------------------------------------------------------------------ running
    def start(
        self, name: str, *extra: str, prefix: Sequence[str] = (), script: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """``server``, or a site by its name. ``prefix``: a command to run it in; ``script``:
        instead of the site's.
        """
        what = ["server", str(self.server)] if name == "server" else ["site", str(self.site(name))]
        command = [*FEDGROVE, *what] if script is None else [sys.executable, str(script), what[1]]
        environment = {**os.environ, "PYTHONPATH": os.path.abspath("src"), "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*prefix, *command, *extra], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        return self.running[name]

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def said(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            server = self.running.get("server")
            assert server is None or server.poll() is None or condition(), (
                f"{what}: the server ended\n{self.all()}"
            )
            assert time.monotonic() < deadline, f"waited too long: {what}\n{self.all()}"
            time.sleep(0.1)

    def finish(self, code: int = 0) -> None:
        """Wait for the server to end."""
        assert self.running["server"].wait(PATIENCE) == code, self.all()

    def all(self) -> str:
        return "\n".join(
            f"--- {name}\n{self.said(name)[-4000:]}" for name in ("server", *self.names)
        )

    # ------------------------------------------------------------------ looking
    @property
    def run(self) -> Path:
        return self.server / self.job.directory()

    def lines(self, split: str) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return []
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in found if line.get("split") == split]

    def rounds(self) -> int:
        """Rounds of the last checkpoint."""
        latest = self.run / "checkpoints" / "latest.json"
        return int(json.loads(latest.read_text())["round"]) if latest.exists() else 0

    def events(self) -> list[dict[str, Any]]:
        path = self.run / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def adapter(self, name: str) -> dict[str, bytes]:
        """The tensors of the adapter that the last run left at a site."""
        (folder,) = (self.site(name) / "runs").glob(f"*/adapters/{name}")
        return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}

    def local(self) -> Path:
        """The same job in one process."""
        from fedgrove.start import run

        out = self.folder / "local"
        return run(
            self.job.replace(train={"cohort": 1}), out
        ).path  # a cohort's batches round differently

    def same_as_local(self) -> None:
        """Adapters, measures and bytes equal those of the local engine."""
        local = self.local()
        for name in self.names:
            there = {
                file.name: file.read_bytes()
                for file in sorted((local / "adapters" / name).glob("*.safetensors"))
            }
            assert self.adapter(name) == there, name
        from fedgrove.tracking.metrics import read

        for split in ("train", "test"):
            expected = [line for line in read(local / "metrics.jsonl") if line["split"] == split]
            key = lambda line: (line["round"], line["client"])  # noqa: E731
            drop = {"seconds"}
            found = [
                {k: v for k, v in line.items() if k not in drop}
                for line in sorted(self.lines(split), key=key)
            ]
            wanted = [
                {k: v for k, v in line.items() if k not in drop}
                for line in sorted(expected, key=key)
            ]
            assert found == wanted, split
