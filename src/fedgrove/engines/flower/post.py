"""Notes over a Flower grid: sent to nodes, collected as they come back, failures as words."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import ConfigRecord
from flwr.serverapp import Grid

from fedgrove.engines.flower.wire import Note, decode, encode
from fedgrove.ground.errors import AdapterError

RECORD, BLOB, SIMULATION = "fedgrove", "tree", "simulation"
TYPES = {
    "train": "train",
    "evaluate": "evaluate",
}  # of Flower; every other kind is a query of its own
QUIET = 30.0  # seconds without an answer after which a node is asked whether it is there
LONGEST_SENTENCE, LONGEST_TRACE = 500, 5000  # characters of what a client says of its error

_LOST, _GONE = (3, 4), 5  # a message or its answer was cut in two; the node went away
_MOST_TIMES = 10  # that one message is sent
#: What Flower says of a message without an answer, by its error code.
_CODES = {
    1: "its ClientApp could not be loaded",
    2: "its ClientApp failed",
    3: "the message expired or was lost before it answered",
    4: "its answer expired or was lost",
    5: "its node is not connected any more",
}


@dataclass(frozen=True)
class Failure:
    """An answer that is none."""

    reason: str
    trace: str = ""
    gone: bool = False  # its node went away with the message; it may come back


@dataclass
class _Sent:
    """A message on its way, and what is needed to send it again."""

    node: int
    note: Note
    until: float | None  # when it expires, by the monotonic clock
    ids: list[str] = field(default_factory=list)  # under which it was sent
    asked: float = 0.0  # when the node was last heard of, or asked
    call: str = ""  # the id of the question whether the node is there
    answered: bool = False  # the node has answered that question, and not the message


def to_content(blob: bytes) -> RecordDict:
    """The one content of all our messages: a blob, as bytes of one array."""
    return RecordDict(
        {RECORD: ArrayRecord({BLOB: Array("uint8", (len(blob),), "fedgrove.adapters.tree", blob)})}
    )


def from_content(content: RecordDict) -> bytes:
    """The blob in a message. Raises ``AdapterError`` where there is none."""
    record = content.get(RECORD)
    if not isinstance(record, ArrayRecord) or BLOB not in record:
        raise AdapterError(
            "A message is none of Fedgrove's; the two sides may run different versions."
        )
    return record[BLOB].data


def message_type(kind: str) -> str:
    return TYPES.get(kind, f"query.{kind}")


class Post:
    """Sends and collects. ``bytes_down`` and ``bytes_up`` count the blobs of training, to compare
    with the theory.

    ``again``: send a message again where it was lost. Flower hands each message to a SuperNode
    once; one that is killed with it, or whose line breaks in mid-message, never answers, although
    it is soon connected again. A site answers one message after the other, so one that answers a
    later question ("here") has lost the earlier message.
    """

    def __init__(self, grid: Grid, *, again: bool = False):
        self.grid, self.again = grid, again
        self.slowest = float(
            getattr(grid, "pull_interval", 1.0)
        )  # seconds between two looks at a grid
        self.bytes_down = self.bytes_up = self.messages = 0
        self._train: set[str] = set()
        self._sent: dict[str, _Sent] = {}  # by the id that the caller got; only with ``again``
        self._inbox: queue.SimpleQueue[tuple[str, list[Message] | BaseException]] = (
            queue.SimpleQueue()
        )
        self._pulling: set[str] = set()  # ids of answers that are being fetched
        self._fetched: dict[str, list[Message]] = {}  # and those that nobody has asked for since

    def nodes(self) -> list[int]:
        return sorted(self.grid.get_node_ids())

    def send(
        self,
        node: int,
        note: Note,
        *,
        seconds: float | None = None,
        simulation: dict[str, str] | None = None,
    ) -> str:
        """The message's id; "" where the grid would not take it. After ``seconds`` it expires
        unread.
        """
        name = self._push(node, note, seconds, simulation)
        if name and note.kind == "train":
            self._train.add(name)
        if name and self.again:
            now = time.monotonic()
            self._sent[name] = _Sent(
                node,
                note,
                None if seconds is None else now + seconds,
                [name],
                now,
            )
        return name

    def _push(
        self,
        node: int,
        note: Note,
        seconds: float | None,
        simulation: dict[str, str] | None = None,
    ) -> str:
        blob = encode(note)
        content = to_content(blob)
        if simulation is not None:
            content[SIMULATION] = ConfigRecord(dict(simulation))
        message = Message(
            content,
            node,
            message_type(note.kind),
            ttl=seconds,
            group_id=str(note.head.get("round", "")),
        )
        ids = [sent for sent in self.grid.push_messages([message]) if sent]
        if not ids:
            return ""
        self.messages += 1
        if note.kind == "train":
            self.bytes_down += len(blob)
        return ids[0]

    def forget(self, ids: Collection[str]) -> None:
        """Nobody waits for these answers any more."""
        for name in ids:
            for sent in self._ids(name):
                self._fetched.pop(sent, None)
            self._sent.pop(name, None)
            self._train.discard(name)

    def collect(
        self,
        ids: Collection[str],
        *,
        needed: Collection[str] | None = None,
        seconds: float | None = None,
    ) -> Iterator[tuple[str, Note | Failure]]:
        """Answers as they come, until all of ``needed`` (default: all) are there or ``seconds``
        have passed.
        """
        if seconds is None:
            until = None
        else:
            until = time.monotonic() + seconds
        waiting, wanted = set(ids), set(ids if needed is None else needed)
        pause = 0.01
        while True:
            ids = {sent: name for name in waiting for sent in self._ids(name)}
            calls = {
                self._sent[name].call: name
                for name in waiting
                if name in self._sent and self._sent[name].call
            }
            arrived = self._pull({*ids, *calls})
            for message in arrived:
                sent = message.metadata.reply_to_message_id
                name = ids.get(sent, "")
                if name in waiting and self._lost(name, message):
                    continue
                if name in waiting:
                    waiting.discard(name)
                    wanted.discard(name)
                    found = self._read(name, message)
                    self.forget([name])
                    yield name, found
                elif sent in calls:
                    self._here(self._sent.get(calls[sent]), message)
            if self.again:
                self._look_after(waiting)
            if not wanted or (until is not None and time.monotonic() >= until):
                return
            if arrived:
                pause = 0.01
            else:
                pause = min(self.slowest, 1.5 * pause)
            time.sleep(pause if until is None else max(0.0, min(pause, until - time.monotonic())))

    # ------------------------------------------------------------------ fetching
    def _pull(self, ids: set[str]) -> list[Message]:
        """The answers that are there. Each is fetched on its own: Flower waits inside for what a
        client still uploads, for minutes where its line broke, and the others must not wait with
        it.
        """
        if not self.again:
            if ids:
                return list(self.grid.pull_messages(ids))
            return []
        for name in ids - self._pulling - set(self._fetched):
            self._pulling.add(name)
            threading.Thread(target=self._fetch, args=(name,), daemon=True).start()
        until = time.monotonic() + max(0.2, self.slowest)
        while self._pulling & ids and time.monotonic() < until:
            self._take(until - time.monotonic())
        while not self._inbox.empty():
            self._take(0)
        found = [message for name in ids for message in self._fetched.pop(name, [])]
        awaited = {each for sent in self._sent.values() for each in (*sent.ids, sent.call)}
        self._fetched = {
            name: messages for name, messages in self._fetched.items() if name in awaited
        }
        return found

    def _fetch(self, name: str) -> None:
        try:
            self._inbox.put((name, list(self.grid.pull_messages([name]))))
        except BaseException as error:
            self._inbox.put((name, error))

    def _take(self, seconds: float) -> None:
        try:
            name, found = self._inbox.get(timeout=max(0.001, seconds))
        except queue.Empty:
            return
        self._pulling.discard(name)
        if isinstance(found, BaseException):
            raise found
        if found:
            self._fetched.setdefault(name, []).extend(found)

    # ------------------------------------------------------------------ messages that got lost
    def _ids(self, name: str) -> list[str]:
        if name in self._sent:
            return self._sent[name].ids
        return [name]

    def _look_after(self, waiting: Collection[str]) -> None:
        """Ask nodes that are silent whether they are there, and send again what they have lost."""
        now = time.monotonic()
        for name in waiting:
            sent = self._sent.get(name)
            if sent is None or now - sent.asked < QUIET:
                continue
            sent.asked = now
            if (
                sent.answered
            ):  # a while ago, and the answer to the message itself would have come before
                if sent.until is None:
                    left = None
                else:
                    left = sent.until - now
                if left is None or left > 0:
                    sent.ids.append(self._push(sent.node, sent.note, left) or sent.ids[0])
                sent.answered = False
            elif not sent.call:
                sent.call = self._push(
                    sent.node,
                    Note("here", {"run": sent.note.head.get("run", "")}),
                    None,
                )

    def _lost(self, name: str, message: Message) -> bool:
        """Whether a broken line lost the message or its answer, and it was sent again."""
        sent = self._sent.get(name)
        if sent is None or not message.has_error() or message.error.code not in _LOST:
            return False
        if sent.until is None:
            left = None
        else:
            left = sent.until - time.monotonic()
        if len(sent.ids) >= _MOST_TIMES or (left is not None and left <= 0):
            return False
        again = self._push(sent.node, sent.note, left)
        if again:
            sent.ids = [
                each for each in sent.ids if each != message.metadata.reply_to_message_id
            ] + [again]
        return bool(again)

    def _here(self, sent: _Sent | None, message: Message) -> None:
        if sent is None:
            return
        sent.call = ""
        if not message.has_error():
            # One more look for the message's own answer, then it is sent again.
            sent.answered, sent.asked = True, time.monotonic() - QUIET + self.slowest

    def _read(self, name: str, message: Message) -> Note | Failure:
        if message.has_error():
            error = message.error
            reason = (
                f"Flower reports {plain(str(error.reason), LONGEST_SENTENCE)} (code {error.code})"
            )
            return Failure(_CODES.get(error.code, reason), gone=error.code == _GONE)
        try:
            blob = from_content(message.content)
            note = decode(blob)
        except AdapterError as error:
            return Failure(str(error))
        except Exception as error:  # whatever a hostile client makes of its bytes, the run goes on
            return Failure(f"its answer cannot be read ({type(error).__name__})")
        if name in self._train:
            self.bytes_up += len(blob)
        if note.kind == "error":
            sentence = plain(str(note.head.get("sentence", "")), LONGEST_SENTENCE)
            return Failure(
                sentence or "it reports an error",
                plain(str(note.head.get("trace", "")), LONGEST_TRACE),
            )
        return note


def plain(text: str, most: int) -> str:
    """At most ``most`` characters of what a client wrote, with nothing in it that a terminal
    obeys.
    """
    return "".join(
        letter if letter.isprintable() or letter == "\n" else " " for letter in text[:most]
    )
