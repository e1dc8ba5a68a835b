"""``RUN/checkpoints/``: full state after a round, atomic, never pickled.

``latest.json`` names the files of the newest complete checkpoint; it is replaced in one rename
after everything that it names is on disk. A client's store is written again only when it changed,
so a round costs what it touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedgrove.adapters.tree import Tree, pack, unpack
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.ground.files import write_bytes
from fedgrove.ground.plain import Plain

_LATEST = "latest.json"


class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, str] = {}

    def exists(self) -> bool:
        return (self.folder / _LATEST).exists()

    def save(
        self,
        round: int,
        server: Tree,
        changed: Mapping[str, Tree],
    ) -> None:
        """``server``: everything that is not a client's; ``changed``: the stores that this round
        touched, by client.
        """
        clients = self.folder / "clients"
        clients.mkdir(parents=True, exist_ok=True)
        server_file = f"server-{round:05d}.safetensors"
        write_bytes(self.folder / server_file, pack(server))
        for name, store in changed.items():
            file = f"clients/{name}-{round:05d}.safetensors"
            self._files[name] = file
            write_bytes(self.folder / file, pack(store, private=True))
        latest = {
            "round": round,
            "server": server_file,
            "clients": self._files,
        }
        text = json.dumps(latest, indent=1)
        write_bytes(self.folder / _LATEST, text.encode())
        self._sweep({server_file, *self._files.values()})

    def load(self) -> tuple[int, Tree, dict[str, Tree]]:
        """(round, server, stores by client) of the newest checkpoint."""
        with self._readable():
            latest = self._latest()
            self._files = dict(latest["clients"])
            stores = {name: self._unpacked(file) for name, file in self._files.items()}
            server = self._unpacked(latest["server"])
            return int(latest["round"]), server, stores

    def load_server(self) -> Tree:
        """The server's part of the newest checkpoint; no client's store is read."""
        with self._readable():
            latest = self._latest()
            return self._unpacked(latest["server"])

    def _latest(self) -> Plain:
        text = (self.folder / _LATEST).read_text()
        latest: Plain = json.loads(text)
        return latest

    def _unpacked(self, file: str) -> Tree:
        data = (self.folder / file).read_bytes()
        return unpack(data)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AdapterError) as error:
            raise RunError(
                f"The checkpoint in {self.folder} cannot be read ({error}); start the run again in "
                f"a new directory."
            ) from error

    def _sweep(self, wanted: set[str]) -> None:
        """Remove what no checkpoint names any more."""
        servers = list(self.folder.glob("*.safetensors*"))
        clients = list(self.folder.glob("clients/*"))
        for file in servers + clients:
            name = file.relative_to(self.folder).as_posix()
            if name not in wanted:
                file.unlink(missing_ok=True)
