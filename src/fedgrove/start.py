"""A whole run: directory, engine, rounds, finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedgrove.engines.base import Stage
from fedgrove.engines.local import LocalEngine
from fedgrove.ground.errors import JobError, RunError
from fedgrove.privacy.check import refuse_unfit
from fedgrove.runs.directory import RunDirectory
from fedgrove.runs.finish import finish
from fedgrove.runs.loop import Loop, TooFew
from fedgrove.runs.prepare import prepare
from fedgrove.tracking.callback import Callback, Callbacks
from fedgrove.training.profile import span

if TYPE_CHECKING:
    from fedgrove.job import Job
    from fedgrove.runs.prepare import Prepared
    from fedgrove.use.result import Result


class Opener(Protocol):
    """Makes everything that a run needs, for as long as it lasts."""

    def __call__(
        self, job: Job, directory: RunDirectory, *, resume: bool, watch: Callback
    ) -> AbstractContextManager[Stage]: ...


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
    its last checkpoint, a finished one is left as it is, and another job's directory is refused.
    ``baselines`` are finished runs that the report shows beside this one.
    Raises ``FedgroveError`` for bad input before anything is written; ``KeyboardInterrupt`` leaves
    a resumable run.
    """
    from fedgrove.use.result import Result

    directory = RunDirectory(Path(out) if out is not None else job.directory())
    job = directory.admit(job, resume=resume)
    if resume and directory.finished():
        return Result(directory.path)
    watch = Callbacks(callbacks)
    try:
        with directory.lock():
            watch.phase("loading model and data")
            with opener(engine)(job, directory, resume=resume, watch=watch) as stage:
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
        return in_process
    if isinstance(engine, str):
        raise JobError(f"There is no engine {engine!r}; there are local and flower.")
    return engine


@contextmanager
def in_process(
    job: Job, directory: RunDirectory, *, resume: bool, watch: Callback
) -> Iterator[Stage]:
    """The local engine. A run that was begun on Flower has its clients' stores elsewhere."""
    if (directory.path / "flower.json").exists():
        raise RunError(
            f"{directory.path} was begun with the flower engine; go on with --engine flower, or "
            f"choose another --out."
        )
    with span("loading model and data"):
        prepared = prepare(job)
    for remark in remarks(prepared):
        watch.remark(remark)
    yield prepared


def remarks(prepared: Prepared) -> list[str]:
    """What a user would want to know before the run goes on."""
    most = prepared.task.tokens.get("max_length", 0)
    rows = [
        row for parts in prepared.engine.data.values() for part in parts.values() for row in part
    ]
    full = sum(len(row["input_ids"]) >= most for row in rows if "input_ids" in row)
    if not full:
        return []
    return [
        f"{full} of {len(rows)} rows fill data.max_length = {most} tokens, and longer ones are cut "
        f"there "
        "(`fedgrove data --tokens` counts them)"
    ]


def conduct(
    stage: Stage,
    directory: RunDirectory,
    watch: Callback,
    *,
    resume: bool,
    baselines: Sequence[Path] = (),
) -> None:
    """All the rounds that are left, and the finish, on whatever engine the stage has."""
    if stage.job.run.noise and not isinstance(stage.engine, LocalEngine):
        raise JobError(
            "run.noise = true looks into what is private to the clients, which only the local "
            "engine can; set it to "
            "false, or run with the local engine."
        )
    refuse_impossible(stage)
    refuse_unfit(
        stage.job,
        stage.method,
        stage.head,
        clients=len(stage.clients),
        held_out=bool(stage.held_out),
        local=isinstance(stage.engine, LocalEngine),
    )
    directory.open(stage, resume=resume)
    loop = Loop(stage, directory, watch)
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


def refuse_impossible(stage: Stage) -> None:
    """What of ``[federation]`` this method or this number of clients cannot do."""
    wanted, method = stage.job.federation, stage.method
    if wanted.late == "next" and not method.stale:
        raise JobError(
            f'federation.late = "next", but an update of {method.title} means something only in '
            f"the round it was "
            'trained in; set it to "drop".'
        )
    drawn = max(1, round(wanted.fraction * len(stage.clients)))
    if wanted.min_clients > drawn:
        raise JobError(
            f"federation.min_clients = {wanted.min_clients}, but a round draws {drawn} of "
            f"{len(stage.clients)} clients "
            f"(federation.fraction = {wanted.fraction:g}); lower it, or draw more."
        )
