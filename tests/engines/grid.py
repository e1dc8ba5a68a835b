"""A Flower grid in this process: real messages, the real ClientApp, no SuperLink and no Ray."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedgrove.deploy import app
from fedgrove.engines.flower.post import from_content, to_content
from fedgrove.engines.flower.serve import on_virtual_nodes
from fedgrove.engines.flower.wire import Note, decode, encode
from fedgrove.start import run
from fedgrove.use.result import Result

#: (node's client, what was asked, its answer) -> what is sent instead: a message, bytes that are
#: none, or nothing
Change = Callable[[str, Note, Note], Note | bytes | None]


class FakeGrid(Grid):
    """``nodes`` virtual nodes that answer when they are asked. ``blobs``: every message both ways.

    ``change`` may alter an answer or lose it (None). An answer in ``late`` waits for a message of a
    later round.
    ``errors``: Flower's own error code, by node, for whatever that node is asked. ``configs``: of
    nodes that are sites.
    """

    pull_interval = 0.0

    def __init__(
        self,
        nodes: int,
        change: Change | None = None,
        configs: dict[int, dict[str, Any]] | None = None,
    ):
        self.online = set(range(1, nodes + 1))
        self.change = change
        self.configs = configs or {}
        self.blobs: list[tuple[str, bytes]] = []  # (direction, blob)
        self.errors: dict[int, int] = {}
        self.late: dict[
            tuple[str, int], int
        ] = {}  # (client, round it trained in) -> round in which the answer comes
        self._held: list[tuple[int, str, Message]] = []
        self._answers: dict[str, Message] = {}
        self._count = itertools.count(1)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **named: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            node = message.metadata.dst_node_id
            asked = decode(from_content(message.content))
            round = int(asked.head.get("round", 0))
            self._answers |= {name: answer for when, name, answer in self._held if when <= round}
            self._held = [each for each in self._held if each[0] > round]
            name = f"m{next(self._count)}"
            message.metadata.__dict__["_message_id"] = name
            sent.append(name)
            self.blobs.append(("down", from_content(message.content)))
            if node in self.errors:
                self._answers[name] = Message(
                    Error(self.errors[node], "as the test wants"), reply_to=message
                )
                continue
            config = self.configs.get(
                node, {"partition-id": node - 1, "num-partitions": len(self.online)}
            )
            context = Context(1, node, config, RecordDict(), {})
            answer = app.client(message, context)
            blob = from_content(answer.content)
            client = self.name(message, node)
            if self.change is not None:
                changed = self.change(client, asked, decode(blob))
                if changed is None:
                    continue
                blob = changed if isinstance(changed, bytes) else encode(changed)
                answer = Message(to_content(blob), reply_to=message)
            self.blobs.append(("up", blob))
            if asked.kind == "train" and (client, round) in self.late:
                self._held.append((self.late[client, round], name, answer))
            else:
                self._answers[name] = answer
        return sent

    def name(self, message: Message, node: int) -> str:
        told = message.content.get("simulation")
        return str(told["name"]) if told else f"site-{node - 1}"

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answers.pop(name) for name in list(message_ids) if name in self._answers]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process counts as one of Ray's; its workshop and its working directory are left as they
    were.
    """
    from fedgrove.engines.flower import client_app, place

    monkeypatch.setattr(client_app, "is_virtual", lambda: True)
    monkeypatch.chdir(Path.cwd())
    for part in (
        "_run_id",
        "_task_id",
        "_node_id",
    ):  # what Flower's own processes know of themselves
        monkeypatch.setattr(TaskIdentity, part, 1)
    yield
    client_app.workshops.cache_clear()
    place.federation.cache_clear()


def run_on(grid: FakeGrid, job: Any, out: Path, **more: Any) -> Result:
    """``fedgrove run`` with the clients on ``grid``."""

    @contextmanager
    def lend(nodes: int, job: Any) -> Iterator[Grid]:
        yield grid

    return run(job, out, engine=partial(on_virtual_nodes, lend), **more)
