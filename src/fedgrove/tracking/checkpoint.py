"""``RUN/checkpoints/``: full state after a round, atomic, never pickled.

``latest.json`` names the files of the newest complete checkpoint, and of an earlier one that is
kept beside it (``run.keep = "best"``); it is replaced in one rename after everything that it names
is on disk. A client's store is written again only when it changed, so a round costs what it touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedgrove.adapters.tree import Tree, pack, unpack
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.ground.files import write_bytes
from fedgrove.ground.plain import Given, Plain

_LATEST = "latest.json"


class Checkpoints:
    """Writes and reads the checkpoints of one run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, str] = {}
        self._kept: Plain | None = None  # as ``latest``, of the one kept beside it

    def exists(self) -> bool:
        return (self.folder / _LATEST).exists()

    def save(
        self,
        round: int,
        server: Tree,
        changed: Mapping[str, Tree],
        *,
        kept: int = 0,
    ) -> None:
        """``server``: everything that is not a client's; ``changed``: the stores that this round
        touched, by client; ``kept``: the round whose checkpoint stays beside this one, which is
        this one or was saved with the same word before; 0 is none.
        """
        clients = self.folder / "clients"
        clients.mkdir(parents=True, exist_ok=True)
        server_file = f"server-{round:05d}.safetensors"
        write_bytes(self.folder / server_file, pack(server))
        for name, store in changed.items():
            file = f"clients/{name}-{round:05d}.safetensors"
            self._files[name] = file
            write_bytes(self.folder / file, pack(store, private=True))
        latest: Plain = {
            "round": round,
            "server": server_file,
            "clients": dict(self._files),
        }
        if kept == round:
            self._kept = dict(latest)
        elif kept == 0:
            self._kept = None
        wanted = {server_file, *self._files.values()}
        if self._kept is not None:
            latest["kept"] = self._kept
            wanted |= {self._kept["server"], *self._kept["clients"].values()}
        text = json.dumps(latest, indent=1)
        write_bytes(self.folder / _LATEST, text.encode())
        self._sweep(wanted)

    def load(self) -> tuple[int, Tree, dict[str, Tree]]:
        """(round, server, stores by client) of the newest checkpoint."""
        with self._readable():
            latest = self._latest()
            self._files = dict(latest["clients"])
            self._kept = latest.get("kept")
            return self._read(latest)

    def load_kept(self) -> tuple[int, Tree, dict[str, Tree]]:
        """The same of the one that is kept beside it; the newest where there is none."""
        with self._readable():
            latest = self._latest()
            return self._read(latest.get("kept", latest))

    def load_server(self, *, kept: bool = False) -> Tree:
        """The server's part of the newest checkpoint, or of the ``kept`` one where there is one; no
        client's store is read.
        """
        with self._readable():
            latest = self._latest()
            if kept:
                latest = latest.get("kept", latest)
            return self._unpacked(latest["server"])

    def _read(self, named: Given) -> tuple[int, Tree, dict[str, Tree]]:
        stores = {name: self._unpacked(file) for name, file in named["clients"].items()}
        server = self._unpacked(named["server"])
        return int(named["round"]), server, stores

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
