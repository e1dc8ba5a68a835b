"""A client's private stores on its own disk, one file a round, so that a server that goes back
finds the right one.

The server names the round whose store to start from: that of the client's last update that it took.
A store whose update was lost, late or refused is therefore never built upon, and a server that
resumes from round k has its clients continue from what they were at k.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedgrove.adapters.tree import pack, unpack
from fedgrove.ground.errors import AdapterError, RunError
from fedgrove.ground.files import write_bytes
from fedgrove.ground.plain import Plain

_NAME = re.compile(r"store-(\d+)\.safetensors")


class Stores:
    """The stores of one client in one run. Round 0 is the empty store of a client that never
    trained.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, round: int) -> Plain:
        """The store after ``round``. Raises ``RunError`` where this disk has none."""
        if round == 0:
            return {}
        try:
            return unpack(self._file(round).read_bytes())
        except (OSError, AdapterError):
            raise RunError(
                f"{self.folder} has no readable store of round {round}: this client did not train "
                f"in this run from "
                "here, or its folder was changed; bring the folder back, or start the run anew."
            ) from None

    def save(
        self,
        round: int,
        store: Plain,
        *,
        keep: int,
    ) -> None:
        """Write the store after ``round``; older ones than that of round ``keep`` go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self._file(round), pack(store, private=True))
        for file in self.folder.iterdir():
            found = _NAME.fullmatch(file.name)
            if found and int(found[1]) < keep:
                file.unlink(missing_ok=True)

    def _file(self, round: int) -> Path:
        return self.folder / f"store-{round:05d}.safetensors"
