"""The Flower app: ``fedgrove.deploy.app:server`` and ``:client``, for any method and any job.

Run configuration of the server: ``job`` (a job file, or its whole text), ``out`` (the run's
directory; without it the job's ``run.out``), ``resume`` (true goes on from the last checkpoint, and
starts where there is none), ``nodes`` (``NODE=NAME,...``: whose key each node has).
Node configuration of a client: ``site`` (the site's folder). A node without one works only as a
virtual node.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedgrove.deploy.site import open_place
from fedgrove.deploy.strategy import Rounds
from fedgrove.engines.flower.client import HalfOf, Runtime, Workshops
from fedgrove.engines.flower.client_app import client_app, simulated_runtime, workshops
from fedgrove.ground.errors import FedgroveError, JobError
from fedgrove.job import Job

server = ServerApp()


@server.main()
def _serve(grid: Grid, context: Context) -> None:
    config = context.run_config
    try:
        job = job_of(str(config.get("job", "")))
        out = Path(str(config.get("out") or "") or job.directory())
        names = names_of(str(config.get("nodes", "")))
        Rounds(job, out, resume=bool(config.get("resume", False)), names=names).start(grid)
    except FedgroveError as error:
        # Flower shows a traceback; the sentence goes before it.
        print(f"Error: {error}", flush=True)
        raise


def job_of(given: str) -> Job:
    """The job that a run configuration names, or is. Raises ``JobError``."""
    if not given:
        raise JobError(
            "The run configuration names no job; give one, such as --run-config 'job=\"job.toml\"'."
        )
    if "\n" in given:
        return Job.parse(given, "the job in the run configuration")
    return Job.load(given)


def names_of(given: str) -> dict[int, str]:
    """``"7=clinic-a,9=clinic-b"`` as a table of nodes. Raises ``JobError``."""
    try:
        pairs = [pair.split("=", 1) for pair in given.split(",") if pair.strip()]
        return {int(node): name.strip() for node, name in pairs}
    except ValueError:
        raise JobError(
            f"nodes = {given!r} in the run configuration is no list of NODE=NAME."
        ) from None


def runtime(message: Message, context: Context) -> Runtime:
    """Whoever works at this node. Raises ``JobError`` where nothing says who that is."""
    site = context.node_config.get("site")
    if site:
        return Runtime(open_place(str(site)), workshops())
    return simulated_runtime(message, context)


client = client_app(runtime)


def site_client(half: HalfOf) -> ClientApp:
    """The client of a site where something else trains than the job's own kernels."""
    shops = Workshops(half)

    def at(message: Message, context: Context) -> Runtime:
        return Runtime(open_place(str(context.node_config["site"])), shops)

    return client_app(at)
