"""The Flower app: ``fedgrove.deploy.app:server`` and ``:client``, for any method and any job.

Run configuration of the server: ``job`` (a job file, or its whole text), ``out`` (the run's
directory; without it the job's ``run.out``), ``resume`` (true goes on from the last checkpoint, and
starts where there is none), ``nodes`` (``NODE=NAME,...``: whose key each node has).
Node configuration of a client: ``site`` (the site's folder). A node without one works only as a
virtual node.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedgrove.engines.flower.post import SIMULATION, from_content, to_content
from fedgrove.engines.flower.wire import KINDS, Note, encode
from fedgrove.ground.errors import FedgroveError, JobError

if TYPE_CHECKING:
    from fedgrove.engines.flower.client import Runtime
    from fedgrove.job import Job

server = ServerApp()
client = ClientApp()


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    from fedgrove.deploy.strategy import Rounds

    config = context.run_config
    try:
        job = job_of(str(config.get("job", "")))
        out = Path(str(config.get("out") or "") or job.directory())
        names = names_of(str(config.get("nodes", "")))
        Rounds(job, out, resume=bool(config.get("resume", False)), names=names).start(grid)
    except FedgroveError as error:
        print(
            f"Error: {error}", flush=True
        )  # Flower shows a traceback; the sentence goes before it
        raise


def job_of(given: str) -> Job:
    """The job that a run configuration names, or is. Raises ``JobError``."""
    from fedgrove.job import Job

    if not given:
        raise JobError(
            "The run configuration names no job; give one, such as --run-config 'job=\"job.toml\"'."
        )
    return (
        Job.parse(given, "the job in the run configuration") if "\n" in given else Job.load(given)
    )


def names_of(given: str) -> dict[int, str]:
    """``"7=clinic-a,9=clinic-b"`` as a table of nodes. Raises ``JobError``."""
    try:
        pairs = [pair.split("=", 1) for pair in given.split(",") if pair.strip()]
        return {int(node): name.strip() for node, name in pairs}
    except ValueError:
        raise JobError(
            f"nodes = {given!r} in the run configuration is no list of NODE=NAME."
        ) from None


def _answer(message: Message, context: Context) -> Message:
    try:
        answer = runtime(message, context).handle(from_content(message.content))
    except Exception as error:  # where a client works cannot be said, or its site file is wrong
        words = (
            str(error)
            if isinstance(error, FedgroveError)
            else f"Unexpected {type(error).__name__}."
        )
        answer = encode(Note("error", {"sentence": words}))
    return Message(to_content(answer), reply_to=message)


for _kind in KINDS:
    _register = {"train": client.train(), "evaluate": client.evaluate()}.get(_kind) or client.query(
        _kind
    )
    _register(_answer)


def runtime(message: Message, context: Context) -> Runtime:
    """Whoever works at this node. Raises ``JobError`` where nothing says who that is."""
    from fedgrove.engines.flower.client import Runtime

    site = context.node_config.get("site")
    if site:
        from fedgrove.deploy.site import open_place

        return Runtime(open_place(str(site)))
    told = message.content.get(SIMULATION)
    if told is None or not is_virtual():
        raise JobError(
            "This node has no site; start it with `fedgrove deploy site`, which gives its site "
            "file."
        )
    from fedgrove.engines.flower.place import simulated

    partition = int(str(context.node_config["partition-id"]))
    place = simulated(str(told["run"]), str(told["directory"]), partition, str(told["name"]))
    return Runtime(place, simulated=True)


def is_virtual() -> bool:
    """Whether this process is one of Ray's, where a simulation's clients work."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
