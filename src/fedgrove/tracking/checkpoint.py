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
from typing import Any

from fedgrove.adapters.tree import Tree, pack, unpack
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.ground.files import write_bytes

_LATEST = "latest.json"


class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, str] = {}

    def exists(self) -> bool:
        return (self.folder / _LATEST).exists()

    def save(self, round: int, server: Tree, changed: Mapping[str, Tree]) -> None:
        """``server``: everything that is not a client's; ``changed``: the stores that this round
        touched, by client.
        """
        (self.folder / "clients").mkdir(parents=True, exist_ok=True)
        server_file = f"server-{round:05d}.safetensors"
        write_bytes(self.folder / server_file, pack(server))
        for name, store in changed.items():
            self._files[name] = f"clients/{name}-{round:05d}.safetensors"
            write_bytes(self.folder / self._files[name], pack(store, private=True))
        latest = {"round": round, "server": server_file, "clients": self._files}
        write_bytes(self.folder / _LATEST, json.dumps(latest, indent=1).encode())
        self._sweep({server_file, *self._files.values()})

    def load(self) -> tuple[int, Tree, dict[str, Tree]]:
        """(round, server, stores by client) of the newest checkpoint."""
        with self._readable():
            latest = self._latest()
            self._files = dict(latest["clients"])
            stores = {
                name: unpack((self.folder / file).read_bytes())
                for name, file in self._files.items()
            }
            return int(latest["round"]), self._server(latest), stores

    def load_server(self) -> Tree:
        """The server's part of the newest checkpoint; no client's store is read."""
        with self._readable():
            return self._server(self._latest())

    def _latest(self) -> dict[str, Any]:
        latest: dict[str, Any] = json.loads((self.folder / _LATEST).read_text())
        return latest

    def _server(self, latest: Mapping[str, Any]) -> Tree:
        return unpack((self.folder / latest["server"]).read_bytes())

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
        for file in [*self.folder.glob("*.safetensors*"), *self.folder.glob("clients/*")]:
            if file.relative_to(self.folder).as_posix() not in wanted:
                file.unlink(missing_ok=True)
