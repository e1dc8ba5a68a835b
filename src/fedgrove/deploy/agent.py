"""A site's worker: takes the messages that its SuperNode received, and answers them with the code
installed here.

Flower's own executor installs the app that the server sent and runs *its* code in a new process for
each message. Here neither happens: whatever app the server sent is left unopened, the installed
``app.client`` answers, and the process stays, so that the base model is loaded once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from logging import getLogger
from typing import TYPE_CHECKING, Any

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flwr.app import Context, Message

_POLL = 0.2  # seconds between two looks for a message; both ends are on this machine
_HEARTBEAT = 10.0  # Flower gives a task up after about 30 s without one
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"

App = Callable[["Message", "Context"], "Message"]


class Agent:
    """Serves one SuperNode's messages, one after the other."""

    def __init__(self, runtime: str, secret: bytes, app: App):
        """``runtime``: host:port of the SuperNode's own interface on this machine; ``secret`` opens
        it.
        """
        self.runtime, self.secret, self.app = runtime, secret, app
        self._log = getLogger(__name__)

    def serve(self, alive: Callable[[], bool]) -> None:
        """Work until ``alive`` says no. A SuperNode that is away is waited for."""
        with self._client(
            SuperExecAuthHttpInterceptor(master_secret=self.secret, protected_methods={_ACQUIRE})
        ) as own:
            while alive():
                token = self._next(own)
                if token:
                    self.answer(token)
                else:
                    time.sleep(_POLL)

    def answer(self, token: str) -> None:
        """One message: fetch it, answer it, hand the answer over. What goes wrong on the way is
        logged, not raised.
        """
        with self._client(RuntimeTokenHttpInterceptor(token)) as client, _beating(client):
            try:
                message, context, _run, _unopened = pull_task_input(client)
                reply = self.app(message, context)
                push_message(client, reply, context)
                push_task_output(client, context, SubStatus.COMPLETED, "")
            except Exception as error:
                # The SuperNode went away while we worked, or had sent the answer before we were
                # told so. Flower has many classes for it; a lost answer is covered by the server's
                # deadline, and the site goes on.
                words = " ".join(str(error).split())[:200]
                self._log.warning(
                    "An answer could not be handed over (%s: %s).", type(error).__name__, words
                )

    def _next(self, client: RuntimeHttpClient) -> str:
        try:
            found = client.AcquireTask(
                AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
            )
        except httpx.HTTPError:
            time.sleep(1.0)  # the SuperNode is starting, or away
            return ""
        if found.HasField("task"):
            return str(found.token)
        return ""

    @contextmanager
    def _client(self, *interceptors: Any) -> Iterator[RuntimeHttpClient]:
        client = RuntimeHttpClient.from_server_address(
            server_address=self.runtime,
            insecure=True,  # within this machine; the secret keeps its other users out
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *interceptors],
        )
        try:
            yield client
        finally:
            client.close()


@contextmanager
def _beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Tells the SuperNode that the task is being worked on."""
    over = threading.Event()

    def beat() -> None:
        while not over.is_set():
            with suppress(httpx.HTTPError):
                client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            over.wait(_HEARTBEAT)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
