"""Notes over a Flower grid: sent to nodes, collected as they come back, failures as words."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import ConfigRecord
from flwr.serverapp import Grid

from fedgrove.engines.flower.wire import Note, decode, encode
from fedgrove.errors import AdapterError

RECORD, BLOB, SIMULATION = "fedgrove", "tree", "simulation"
TYPES = {"train": "train", "evaluate": "evaluate"}  # of Flower; every other kind is a query of its own

#: What Flower says of a message without an answer, by its error code.
_CODES = {
    1: "its ClientApp could not be loaded",
    2: "its ClientApp failed",
    3: "the message expired before it answered",
    4: "the message expired before it answered",
    5: "its node is not connected any more",
}


@dataclass(frozen=True)
class Failure:
    """An answer that is none."""

    reason: str
    trace: str = ""


def to_content(blob: bytes) -> RecordDict:
    """The one content of all our messages: a blob, as bytes of one array."""
    return RecordDict({RECORD: ArrayRecord({BLOB: Array("uint8", (len(blob),), "fedgrove.tree", blob)})})


def from_content(content: RecordDict) -> bytes:
    """The blob in a message. Raises ``AdapterError`` where there is none."""
    record = content.get(RECORD)
    if not isinstance(record, ArrayRecord) or BLOB not in record:
        raise AdapterError("A message is none of Fedgrove's; the two sides may run different versions.")
    return record[BLOB].data


def message_type(kind: str) -> str:
    return TYPES.get(kind, f"query.{kind}")


class Post:
    """Sends and collects. ``bytes_down`` and ``bytes_up`` count the blobs of training, to compare with the theory."""

    def __init__(self, grid: Grid):
        self.grid = grid
        self.slowest = float(getattr(grid, "pull_interval", 1.0))  # seconds between two looks at a grid
        self.bytes_down = self.bytes_up = self.messages = 0
        self._train: set[str] = set()

    def nodes(self) -> list[int]:
        return sorted(self.grid.get_node_ids())

    def send(
        self, node: int, note: Note, *, seconds: float | None = None, simulation: dict[str, str] | None = None
    ) -> str:
        """The message's id; "" where the grid would not take it. After ``seconds`` it expires unread."""
        blob = encode(note)
        content = to_content(blob)
        if simulation is not None:
            content[SIMULATION] = ConfigRecord(dict(simulation))
        message = Message(content, node, message_type(note.kind), ttl=seconds, group_id=str(note.head.get("round", "")))
        ids = [sent for sent in self.grid.push_messages([message]) if sent]
        if not ids:
            return ""
        self.messages += 1
        if note.kind == "train":
            self._train.add(ids[0])
            self.bytes_down += len(blob)
        return ids[0]

    def collect(
        self, ids: Collection[str], *, needed: Collection[str] | None = None, seconds: float | None = None
    ) -> Iterator[tuple[str, Note | Failure]]:
        """Answers as they come, until all of ``needed`` (default: all) are there or ``seconds`` have passed."""
        until = None if seconds is None else time.monotonic() + seconds
        waiting, wanted = set(ids), set(ids if needed is None else needed)
        pause = 0.01
        while True:
            arrived = list(self.grid.pull_messages(waiting)) if waiting else []
            for message in arrived:
                name = message.metadata.reply_to_message_id
                if name in waiting:
                    waiting.discard(name)
                    wanted.discard(name)
                    yield name, self._read(name, message)
            if not wanted or (until is not None and time.monotonic() >= until):
                return
            pause = 0.01 if arrived else min(self.slowest, 1.5 * pause)
            time.sleep(pause if until is None else max(0.0, min(pause, until - time.monotonic())))

    def _read(self, name: str, message: Message) -> Note | Failure:
        if message.has_error():
            error = message.error
            return Failure(_CODES.get(error.code, f"Flower reports {error.reason} (code {error.code})"))
        try:
            blob = from_content(message.content)
            note = decode(blob)
        except AdapterError as error:
            return Failure(str(error))
        if name in self._train:
            self._train.discard(name)
            self.bytes_up += len(blob)
        if note.kind == "error":
            return Failure(str(note.head.get("sentence", "")) or "it reports an error", str(note.head.get("trace", "")))
        return note
