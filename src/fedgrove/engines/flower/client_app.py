"""Flower's ``ClientApp`` around a client at work: which client that is, a function of the node says.

``virtual`` is the app of a simulation, whose nodes are Flower's own and whose processes are Ray's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgrove.engines.flower.client import Runtime, Workshops
from fedgrove.engines.flower.place import simulated
from fedgrove.engines.flower.post import SIMULATION, from_content, to_content
from fedgrove.engines.flower.wire import KINDS, Note, encode
from fedgrove.ground.errors import FedgroveError, JobError

RuntimeOf = Callable[[Message, Context], Runtime]  # who works at the node that got the message


@cache
def workshops() -> Workshops:
    """This process's. Ray hands each message's app to a process as a copy, so that what lasts as
    long as the process cannot be the app's.
    """
    return Workshops()


def client_app(runtime: RuntimeOf) -> ClientApp:
    """An app that answers every kind of message; what goes wrong is an answer too."""

    def answer(message: Message, context: Context) -> Message:
        try:
            blob = runtime(message, context).handle(from_content(message.content))
        except Exception as error:  # where a client works cannot be said, or its site file is wrong
            blob = encode(Note("error", {"sentence": _sentence(error)}))
        return Message(to_content(blob), reply_to=message)

    app = ClientApp()
    app.train()(answer)
    app.evaluate()(answer)
    for kind in KINDS:
        if kind not in ("train", "evaluate"):  # Flower's own; every other kind is a query
            app.query(kind)(answer)
    return app


def simulated_runtime(message: Message, context: Context) -> Runtime:
    """The simulated client that this virtual node works for. Raises ``JobError`` elsewhere."""
    told = message.content.get(SIMULATION)
    if told is None or not is_virtual():
        raise JobError(
            "This node has no site; start it with `fedgrove deploy site`, which gives its site "
            "file."
        )
    partition = int(str(context.node_config["partition-id"]))
    place = simulated(
        str(told["run"]),
        str(told["directory"]),
        partition,
        str(told["name"]),
    )
    return Runtime(place, workshops(), simulated=True)


def is_virtual() -> bool:
    """Whether this process is one of Ray's, where a simulation's clients work."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _sentence(error: Exception) -> str:
    if isinstance(error, FedgroveError):
        return str(error)
    return f"Unexpected {type(error).__name__}."


virtual = client_app(simulated_runtime)
