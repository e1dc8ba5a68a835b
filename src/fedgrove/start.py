"""A whole run: directory, engine, rounds, finish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedgrove.ground.ctrlc import remembered
from fedgrove.ground.errors import JobError
from fedgrove.runs.directory import RunDirectory
from fedgrove.runs.finish import finish
from fedgrove.runs.loop import Loop, TooFew
from fedgrove.runs.records import Records
from fedgrove.tracking.callback import Callback, Callbacks
from fedgrove.training.profile import span

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.runs.engine import Engine
    from fedgrove.runs.stage import Stage
    from fedgrove.use.result import Result


class Opener(Protocol):
    """Makes everything that a run needs, for as long as it lasts, and refuses a job that cannot be
    run (``runs.fit``) before it starts anything.
    """

    def __call__(
        self, job: Job, directory: RunDirectory, *, resume: bool, watch: Callback
    ) -> AbstractContextManager[Stage[Engine]]: ...


def run(
    job: Job,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    baselines: Sequence[Path] = (),
    engine: str | Opener = "local",
) -> Result:
    """Run a job into the directory ``out`` (default: the job's ``run.out``).

    ``engine``: "local" trains all clients in this process, "flower" simulates them on Flower and
    Ray, an ``Opener`` brings its own. With ``resume`` a stopped run goes on bit-identically from
    its last checkpoint, a finished one is left as it is unless the job has more rounds (local
    engine), and another job's directory is refused.
    ``baselines`` are finished runs that the report shows beside this one.
    Raises ``FedgroveError`` for bad input before anything is written; ``KeyboardInterrupt`` leaves
    a resumable run.
    """
    from fedgrove.use.result import Result

    directory = RunDirectory(Path(out) if out is not None else job.directory())
    job = directory.admit(job, resume=resume, longer=engine == "local")
    done = directory.finished() and job.run.rounds == directory.recorded_rounds()
    if resume and done:
        return Result(directory.path)
    watch = Callbacks(callbacks)
    try:
        with remembered(), directory.lock():
            watch.phase("loading model and data")
            with opener(engine)(job, directory, resume=resume, watch=watch) as stage:
                for remark in (*stage.federation.remarks, *stage.base.notes):
                    watch.remark(remark)
                conduct(stage, directory, watch, resume=resume, baselines=baselines)
    finally:
        watch.close()
    return Result(directory.path)


def opener(engine: str | Opener) -> Opener:
    """What makes the stage of a run."""
    if engine == "flower":
        from fedgrove.engines.flower.simulate import simulated

        return simulated
    if engine == "local":
        from fedgrove.engines.local import in_process

        return in_process
    if isinstance(engine, str):
        raise JobError(f"There is no engine {engine!r}; there are local and flower.")
    return engine


def conduct(
    stage: Stage[Engine],
    directory: RunDirectory,
    watch: Callback,
    *,
    resume: bool,
    baselines: Sequence[Path] = (),
) -> None:
    """All the rounds that are left, and the finish, on whatever engine the stage has."""
    directory.open(stage, resume=resume)
    loop = Loop(stage, Records.at(directory.path, watch, stage.lab))
    try:
        loop.rounds()
        with span("finish"):
            finish(loop, baselines=baselines)
    except KeyboardInterrupt:
        watch.run_stopped(loop.done, "interrupted")
        raise
    except TooFew:
        watch.run_stopped(loop.done, "too few clients")
        raise
