"""A site's worker against a SuperNode that is slow, away, or changes its mind: it goes on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr")

from fedgrove.deploy import agent as agents
from fedgrove.deploy.agent import Agent


class Runtime:
    """Hands out tokens as a SuperNode does; None: nothing to do, an exception: it is away."""

    def __init__(self, *tokens: Any):
        self.tokens = list(tokens)

    def AcquireTask(self, request: Any) -> Any:
        from flwr.proto.runtime_pb2 import AcquireTaskResponse
        from flwr.proto.task_pb2 import Task

        assert list(request.supported_task_types) == ["flwr-clientapp"]
        token = self.tokens.pop(0)
        if isinstance(token, Exception):
            raise token
        return (
            AcquireTaskResponse(token=token, task=Task(task_id=1))
            if token
            else AcquireTaskResponse()
        )

    def SendTaskHeartbeat(self, request: Any) -> None:
        raise httpx.ConnectError("away")


def serve(monkeypatch: pytest.MonkeyPatch, tokens: list[Any], push: Any) -> list[str]:
    """What the agent did with these tokens; ``push`` is called where an answer is handed over."""
    runtime, done = Runtime(*tokens), []
    monkeypatch.setattr(Agent, "_client", lambda self, *interceptors: nullcontext(runtime))
    monkeypatch.setattr(agents.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(
        agents,
        "pull_task_input",
        lambda client: ("message", "context", "run", "code from the server"),
    )
    monkeypatch.setattr(agents, "push_message", push)
    monkeypatch.setattr(
        agents, "push_task_output", lambda client, context, status, details: done.append(status)
    )

    def app(message: Any, context: Any) -> Any:
        done.append(message)
        return "reply"

    Agent("127.0.0.1:1", b"secret", app).serve(lambda: bool(runtime.tokens))
    return done


def test_each_message_is_answered_by_the_installed_app(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    done = serve(
        monkeypatch,
        ["a", "", httpx.ConnectError("away"), "b"],
        lambda *given: pushed.append(given[1:]),
    )
    assert done == ["message", "completed", "message", "completed"]
    assert pushed == [("reply", "context")] * 2


@pytest.mark.parametrize(
    "error",
    [httpx.ReadTimeout("late"), RuntimeError("no"), KeyError("ObjectPushError"), ValueError("x")],
)
def test_an_answer_that_cannot_be_handed_over_does_not_end_the_site(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*ignored: Any) -> None:
        raise error

    assert serve(monkeypatch, ["a", "b"], fail) == ["message", "message"]


def test_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*ignored: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(monkeypatch, ["a", "b"], interrupt)
