"""``fedgrove run --engine flower``: the clients of a job on virtual nodes of Flower, in Ray's
processes.

The round loop stays in the main thread, so that Ctrl-C, progress and errors are those of a local
run; Flower's simulation runs beside it, and its ServerApp does no more than lend the loop its grid.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedgrove.ground.errors import FedgroveError, RunError
from fedgrove.ground.plain import Plain

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from fedgrove.engines.flower.engine import FlowerEngine
    from fedgrove.job import Job
    from fedgrove.runs.directory import RunDirectory
    from fedgrove.runs.stage import Stage
    from fedgrove.tracking.callback import Callback


class FlowerMissing(FedgroveError):
    """The ``flower`` extra is not installed."""


@contextmanager
def simulated(
    job: Job,
    directory: RunDirectory,
    *,
    resume: bool,
    watch: Callback,
) -> Iterator[Stage[FlowerEngine]]:
    """The stage of a simulation on Ray."""
    require()
    quiet()
    from fedgrove.engines.flower.serve import on_virtual_nodes

    with on_virtual_nodes(ray_grid, job, directory, resume=resume, watch=watch) as stage:
        yield stage


def require() -> None:
    """Raises ``FlowerMissing`` where Flower or Ray is not installed."""
    for module in ("flwr", "ray"):
        if importlib.util.find_spec(module) is None:
            raise FlowerMissing(
                f"The flower engine needs the package {module}; install the extra with pip install "
                f'"fedgrove[flower]".'
            )


def quiet() -> None:
    """No telemetry, and no log lines between ours; what the user set in the environment stays."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # else ray 2 warns of a default that will change
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    logging.getLogger("ray").setLevel(logging.ERROR)


@contextmanager
def ray_grid(nodes: int, job: Job) -> Iterator[Grid]:
    """A grid of virtual nodes, for as long as the context lasts. Raises ``RunError`` where Ray does
    not start.
    """
    from flwr.app import Context
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fedgrove.engines.flower.client_app import virtual

    lent: queue.Queue[Grid | BaseException] = queue.Queue()
    returned = threading.Event()
    lender = ServerApp()

    @lender.main()
    def lend(grid: Grid, context: Context) -> None:
        lent.put(grid)
        returned.wait()

    def simulate() -> None:
        try:
            run_simulation(lender, virtual, nodes, backend_config=resources(nodes, job))
        except BaseException as error:
            lent.put(error)

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    thread = threading.Thread(target=simulate, name="flower simulation", daemon=True)
    thread.start()
    try:
        grid = lent.get()
        if isinstance(grid, BaseException):
            raise RunError(
                f"Flower's simulation did not start: {' '.join(str(grid).split())[:300]}."
            ) from grid
        yield grid
    finally:
        returned.set()
        thread.join(timeout=30)


def resources(nodes: int, job: Job) -> Plain:
    """Ray's share: as many processes as fit with the job's threads each; a GPU serves one of
    them.
    """
    threads = int(job.train.threads)
    start: Plain = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "include_dashboard": False,
    }
    if not os.environ.get("RAY_ADDRESS"):  # a cluster that is there has its own
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        start["num_cpus"] = max(threads, min(cores, nodes * threads))
    share = {
        "num_cpus": threads,
        "num_gpus": 1.0 if job.train.device == "cuda" else 0.0,
    }
    return {"init_args": start, "client_resources": share}
